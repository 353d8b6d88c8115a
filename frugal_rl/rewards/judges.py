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

from frugal_rl.rewards.answers import (
    ANSWER_CHARACTERS,
    Verdict,
    bare_answer,
    final_answer,
    marked_or_last_line,
    normalise,
    phrased_answer,
)
from frugal_rl.rewards.quantities import NUMBER, quantity, same_quantity
from frugal_rl.rewards.structure import Refused, compare


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
        answer = phrased_answer(response)
    if answer is not None:
        return compare_math(gold, answer)
    bare = bare_answer(response)
    if bare is not None:
        found = compare_math(gold, bare[0])
        if found is CORRECT or not bare[1]:
            return found  # with words it may be anything: it is an answer if it is the right one
    return no_answer(r"no \boxed{}, #### or <answer>, nor a last sentence 'The answer is ...'")


# ---- the other rewards ----


def judge_exact(gold: str, response: str) -> Quick:
    """The marked answer, else the last line; spaces and accents in one spelling, case kept."""
    answer = marked_or_last_line(response)
    if not answer:
        return no_answer("the response is empty")
    spelled = (" ".join(unicodedata.normalize("NFC", text).split()) for text in (gold, answer))
    return CORRECT if len(set(spelled)) == 1 else wrong()


def judge_numeric(gold: str, response: str, tolerance: str = "1e-6") -> Quick:
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
    near = abs(value.value - true.value) <= Fraction(str(tolerance)) * max(Fraction(1), abs(true.value))
    return CORRECT if near else wrong()


_LAST = re.compile(r"[;=\s]")


def judge_last(gold: str, response: str) -> Quick:
    """What follows the last `;`, `=` or space, letter by letter: `7+8=15;5+1=6;6` answers 6."""
    answer = _LAST.split(response.strip())[-1]
    if not answer:
        return no_answer("nothing after the last mark")
    return CORRECT if answer == gold.strip() else wrong()


_LETTER = re.compile(r"(?<![A-Za-z0-9])\(?([A-J])\)?(?![A-Za-z0-9'])")


def judge_choice(gold: str, response: str) -> Quick:
    """The letter of the marked answer; without a mark the only letter of the last line that has one."""
    true = _LETTER.search(gold.strip().upper())
    if true is None:
        return Decided(Verdict.ERROR, f"the gold answer {gold[:80]!r} is no letter from A to J")
    marked = final_answer(response)
    if marked is not None:
        letters = _LETTER.findall(normalise(marked[:ANSWER_CHARACTERS]).replace(r"\text", " "))
        if not letters and len(marked) == 1:
            letters = [marked.upper()]
    else:
        lines = [found for line in response.splitlines() if (found := _LETTER.findall(line))]
        letters = lines[-1] if lines else []
    if not letters:
        return no_answer("no letter")
    if len(set(letters)) > 1 and (marked is None or not re.match(r"\W*[A-J]\W", marked)):
        return wrong("several letters")
    return CORRECT if letters[0] == true[1] else wrong()


def judge_tags(gold: str, response: str, *names: str) -> Quick:
    """`<a>...</a><b>...</b>`: each tag once, in this order, with only spaces between and around them."""
    at = 0
    for name in names:
        opening, closing = f"<{name}>", f"</{name}>"
        if response.count(opening) != 1 or response.count(closing) != 1:
            return wrong(f"<{name}> does not stand there once")
        start, end = response.find(opening), response.find(closing)
        if start < at or end < start or response[at:start].strip():
            return wrong(f"text before <{name}>")
        at = end + len(closing)
    return wrong("text after the last tag") if response[at:].strip() else CORRECT


def overlong(response: str, free: str, most: str) -> float:
    """0 up to `free` characters, from there straight down to -1 at `most` and beyond.

    Source: DAPO's soft overlong punishment, arXiv 2503.14476 eq. 13, in characters.
    """
    low, high = int(free), int(most)
    if not 0 <= low < high:
        raise ValueError(f"overlong({free}, {most}): expected fewer free characters than at most")
    return -min(1.0, max(0.0, (len(response) - low) / (high - low)))


KINDS: Final[dict[str, Callable[..., Quick]]] = {
    "exact": judge_exact,
    "numeric": judge_numeric,
    "math": judge_math,
    "last": judge_last,
    "choice": judge_choice,
    "tags": judge_tags,
}
