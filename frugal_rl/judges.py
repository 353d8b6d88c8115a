r"""The built-in rewards: from a gold answer and a response to a verdict, as far as this process can tell.

Law: what is Decided here is exact, by rule and in linear time; what only algebra can tell is Undecided
and left to a worker. No float decides, nothing is evaluated as a program.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from frugal_rl.answers import ANSWER_CHARACTERS, Verdict, final_answer, marked_or_last_line, normalise
from frugal_rl.quantities import NUMBER, quantity, same_quantity
from frugal_rl.structure import Refused, compare


@dataclass(frozen=True)
class Decided:
    verdict: Verdict
    detail: str = ""


@dataclass(frozen=True)
class Undecided:
    """Left to a worker, both normalised. `identical` off: equal spelling alone is not enough."""

    gold: str
    answer: str
    identical: bool = True


Quick = Decided | Undecided
CORRECT: Final = Decided(Verdict.CORRECT)


def wrong(detail: str = "") -> Decided:
    return Decided(Verdict.WRONG, detail)


def no_answer(detail: str) -> Decided:
    return Decided(Verdict.NO_ANSWER, detail)


# ---- math ----


def compare_math(gold: str, answer: str, *, identical: bool = True) -> Quick:
    """`identical` off: equal spelling alone is not enough, both must be understood."""
    if not answer:
        return no_answer("the answer is empty")
    if len(answer) > max(ANSWER_CHARACTERS, len(gold)):
        return wrong(f"{len(answer)} characters, over {ANSWER_CHARACTERS}")
    g, a = normalise(gold), normalise(answer)
    if not a:
        return no_answer("the answer is empty")
    if not g:
        return Decided(Verdict.ERROR, "the gold answer is empty")
    if identical and g.replace(";", ",") == a.replace(";", ","):
        return CORRECT
    numbers = quantity(g), quantity(a)
    if numbers[0] and numbers[1]:
        difference = same_quantity(numbers[0], numbers[1])
        return CORRECT if difference is None else wrong(difference)
    try:
        same = compare(g, a, lambda x, y: True if identical and x == y else None)
    except Refused as error:
        return wrong(str(error))
    return Undecided(g, a, identical) if same is None else CORRECT if same else wrong()


def judge_math(gold: str, response: str) -> Quick:
    answer = final_answer(response)
    if answer is None:
        return no_answer(r"no \boxed{}, #### or <answer>")
    return compare_math(gold, answer)


# ---- the other rewards ----


def judge_exact(gold: str, response: str) -> Quick:
    """The marked answer, else the last line; spaces and accents in one spelling, case kept."""
    answer = marked_or_last_line(response)
    if not answer:
        return no_answer("the response is empty")
    spelled = (" ".join(unicodedata.normalize("NFC", text).split()) for text in (gold, answer))
    return CORRECT if len(set(spelled)) == 1 else wrong()


def judge_numeric(gold: str, response: str, tolerance: float = 1e-6) -> Quick:
    """|answer - gold| <= tolerance * max(1, |gold|); of the marked answer, or the last line's last
    number."""
    marked = final_answer(response)
    line = marked_or_last_line(response)
    if len(line) > ANSWER_CHARACTERS:
        return wrong(f"{len(line)} characters, over {ANSWER_CHARACTERS}")
    true, value = quantity(normalise(gold)), quantity(normalise(line))
    if true is None:
        return Decided(Verdict.ERROR, f"the gold answer {gold[:80]!r} is not a number")
    if value is None and marked is None:
        numbers = [match.group() for match in NUMBER.finditer(line)]
        value = quantity(normalise(numbers[-1])) if numbers else None
    if value is None:
        return wrong("not a number") if marked else no_answer("no number")
    near = abs(value.value - true.value) <= Fraction(tolerance) * max(Fraction(1), abs(true.value))
    return CORRECT if near else wrong()


_LAST = re.compile(r"[;=\s]")


def judge_last(gold: str, response: str) -> Quick:
    """What follows the last `;`, `=` or space, letter by letter: `7+8=15;5+1=6;6` answers 6."""
    answer = _LAST.split(response.strip())[-1]
    if not answer:
        return no_answer("nothing after the last mark")
    return CORRECT if answer == gold.strip() else wrong()


KINDS: Final[dict[str, Callable[[str, str], Quick]]] = {
    "exact": judge_exact,
    "numeric": judge_numeric,
    "math": judge_math,
    "last": judge_last,
}
