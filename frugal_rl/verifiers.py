"""Built-in rewards that run in a worker, because a response or a pattern may keep them busy for long.

Each gets the problem's fields and the response and returns a Verdict with a reason.

- `countdown`: an expression of whole numbers over + - * / that uses the given numbers, each at most as
  often as given (all of them if the problem says `"all": true`), and has the target's value. It is read
  by Python's parser into a tree of four operations and worked out in fractions; nothing is evaluated.
- `regular_expression`: the whole response, spaces around it left out, matches the pattern.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from frugal_rl.answers import Verdict, marked_or_last_line, normalise

EXPRESSION_CHARACTERS = 200
_LATEX = ((r"\\times|\\cdot|×|⋅", "*"), (r"\\div|÷", "/"), (r"\\left|\\right|[$]", ""), ("[−–]", "-"))
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")


def regular_expression(problem: Mapping[str, Any], response: str, pattern: str) -> tuple[Verdict, str]:
    matched = re.fullmatch(pattern, response.strip(), re.DOTALL)
    return (Verdict.CORRECT, "") if matched else (Verdict.WRONG, "it does not match the format")


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
