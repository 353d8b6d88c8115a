"""Built-in rewards that run in a worker, because a response or a pattern may keep them busy for long.

Each gets the problem's fields and the response and returns a Verdict with a reason.

- `countdown`: an expression of whole numbers over + - * / that uses the given numbers, each at most as
  often as given (all of them if the problem says `"all": true`), and has the target's value. It is read
  by Python's parser into a tree of four operations and worked out in fractions; nothing is evaluated.
- `code`: the last fenced block of the response (or its `<answer>`) passes the problem's `tests`, a text or
  list of Python statements such as asserts, or a list of `{"input": ..., "output": ...}` for standard
  input and output; each program runs confined (sandbox.py),
  with the standard library alone. Tests of the first kind run in the program's
  own process: a program that searches its interpreter for their end mark can forge it.
- `regular_expression`: the whole response, spaces around it left out, matches the pattern.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from frugal_rl.rewards.answers import Verdict, final_answer, marked_or_last_line, normalise
from frugal_rl.rewards.sandbox import run_python

EXPRESSION_CHARACTERS = 200
_FENCED = re.compile(r"^[ \t]*```(?:python|py|python3)?[ \t]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_LATEX = ((r"\\times|\\cdot|×|⋅", "*"), (r"\\div|÷", "/"), (r"\\left|\\right|[$]", ""), ("[−–]", "-"))
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")


def regular_expression(problem: Mapping[str, Any], response: str, pattern: str) -> tuple[Verdict, str]:
    matched = re.fullmatch(pattern, response.strip(), re.DOTALL)
    return (Verdict.CORRECT, "") if matched else (Verdict.WRONG, "it does not match the format")


def code(problem: Mapping[str, Any], response: str, seconds: str = "4") -> tuple[Verdict, str]:
    """`seconds` are those of one program. Raises: Unconfined, and ValueError if there are no tests."""
    blocks = _FENCED.findall(response)
    program = blocks[-1] if blocks else final_answer(response)
    if not program or not program.strip():
        return Verdict.NO_ANSWER, "no fenced block of code"
    tests = problem.get("tests", problem.get("answer"))
    cases: list[tuple[str, str, str | None]]
    if isinstance(tests, str) and tests.strip():
        cases = [(tests, "", None)]
    elif isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
        cases = [("\n".join(tests), "", None)]
    elif isinstance(tests, list) and tests:
        cases = [("", str(test["input"]), str(test["output"])) for test in tests]
    else:
        raise ValueError("it has no tests")
    for number, (statements, given, wanted) in enumerate(cases, 1):
        ran = run_python(program, statements, stdin=given, seconds=float(seconds))
        if ran.timed_out:
            return Verdict.TIMEOUT, f"test {number}: no end in {seconds} s"
        if not ran.finished:
            return Verdict.WRONG, f"test {number}: {ran.error[-200:] or 'it ended before its end'}"
        if wanted is not None and ran.output.split() != wanted.split():
            return Verdict.WRONG, f"test {number}: it printed {ran.output[:100]!r}, not {wanted[:100]!r}"
    return Verdict.CORRECT, ""


def countdown(problem: Mapping[str, Any], response: str) -> tuple[Verdict, str]:
    """Raises ValueError if the problem has no target and numbers.

    They are the fields `target` and `nums` (or `numbers`), or an answer such as `24: 3 3 8 8`.
    """
    target, numbers = _task(problem)
    text = marked_or_last_line(response)
    if not text:
        return Verdict.NO_ANSWER, "the response is empty"
    if len(text) > EXPRESSION_CHARACTERS:
        return Verdict.WRONG, f"{len(text)} characters, over {EXPRESSION_CHARACTERS}"
    for pattern, new in _LATEX:
        text = re.sub(pattern, new, text)
    while (plain := _FRACTION.sub(r"((\1)/(\2))", text)) != text:
        text = plain
    sides = text.split("=")
    if len(sides) > 2 or (len(sides) == 2 and normalise(sides[1]) != str(target)):
        return Verdict.WRONG, "it says that it equals something else"
    used: list[int] = []
    try:
        value = _value(ast.parse(sides[0].strip(), mode="eval").body, used)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return Verdict.WRONG, f"not an expression: {error}"
    except ZeroDivisionError:
        return Verdict.WRONG, "a division by zero"
    missing = Counter(used) - Counter(numbers)
    if missing:
        return Verdict.WRONG, f"it uses {', '.join(map(str, missing.elements()))} too often"
    if problem.get("all") and len(used) < len(numbers):
        return Verdict.WRONG, "it does not use all numbers"
    return (Verdict.CORRECT, "") if value == target else (Verdict.WRONG, f"it is {value}")


def _task(problem: Mapping[str, Any]) -> tuple[int, list[int]]:
    numbers = problem.get("nums", problem.get("numbers"))
    if numbers is not None and "target" in problem:
        return int(problem["target"]), [int(number) for number in numbers]
    target, colon, rest = str(problem.get("answer", "")).partition(":")
    if not colon:
        raise ValueError("it has no target and nums, and its answer is not such as '24: 3 3 8 8'")
    return int(target), [int(number) for number in re.findall(r"\d+", rest)]


def _value(node: ast.expr, used: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, used), _value(node.right, used)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return left / right
    raise ValueError("only whole numbers, + - * / and brackets")
