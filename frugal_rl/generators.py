"""Problems made by a rule, each kind with a dial: `gcd` is `gcd:1`, `gcd:4` is harder.

A generator is a function of a source of numbers and the difficulty, from 1, to a prompt and an answer.
It draws with `Draw` alone, which is the same on every machine and Python (tasks.py), and makes only
problems with one right answer, by construction or, for countdown, with one that is known to exist.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Final

HARDEST: Final = 10
_NAMES = ["Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ivo", "Jan", "Kim", "Leo", "Mia", "Ned"]


class Draw:
    """Numbers by `random.Random(seed).random()`, the one sequence that Python promises to keep."""

    def __init__(self, seed: int) -> None:
        self._source = random.Random(seed)

    def between(self, lowest: int, highest: int) -> int:
        return lowest + int(self._source.random() * (highest - lowest + 1))

    def one_of(self, items: str | list[str]) -> str:
        return items[self.between(0, len(items) - 1)]

    def shuffled(self, items: list[str]) -> list[str]:
        return sorted(items, key=lambda item: self._source.random())


Make = Callable[[Draw, int], tuple[str, str]]


@dataclass(frozen=True)
class Generator:
    """`reward` is the `reward.kind` that judges its answers."""

    description: str
    make: Make
    reward: str


def _chain(draw: Draw, level: int) -> tuple[str, str]:
    most = 9 if level < 4 else 99
    text = str(draw.between(1, most))
    total, product = Fraction(0), Fraction(int(text))  # products bind closer than sums
    for _ in range(level + 2):
        operation, number = draw.one_of("+-*"), draw.between(1, most)
        text += f" {operation} {number}"
        if operation == "*":
            product *= number
        else:
            total, product = total + product, Fraction(number if operation == "+" else -number)
    return f"What is {text}?", str(total + product)


def _linear(draw: Draw, level: int) -> tuple[str, str]:
    x, a, b = draw.between(-20 * level, 20 * level), draw.between(2, 11 + level), draw.between(1, 99 * level)
    if level < 3:
        return f"Solve for x: {a}x + {b} = {a * x + b}", str(x)
    c = draw.between(1, a - 1)  # fewer on the right: one solution
    return f"Solve for x: {a}x + {b} = {c}x + {(a - c) * x + b}".replace("+ -", "- "), str(x)


def _two(draw: Draw, level: int) -> tuple[int, int]:
    common = draw.between(2, 10 * level)
    return common * draw.between(2, 40 + 15 * level), common * draw.between(2, 40 + 15 * level)


def _gcd(draw: Draw, level: int) -> tuple[str, str]:
    a, b = _two(draw, level)
    return f"What is the greatest common divisor of {a} and {b}?", str(math.gcd(a, b))


def _lcm(draw: Draw, level: int) -> tuple[str, str]:
    a, b = _two(draw, level)
    return f"What is the least common multiple of {a} and {b}?", str(math.lcm(a, b))


def _base(draw: Draw, level: int) -> tuple[str, str]:
    number, base = draw.between(10, 10 ** (level + 3)), draw.between(2, 9)
    digits, rest = "", number
    while rest:
        rest, digit = divmod(rest, base)
        digits = str(digit) + digits
    return f"Write the decimal number {number} in base {base}, digits only.", digits


def _sort(draw: Draw, level: int) -> tuple[str, str]:
    numbers = [draw.between(0, 99) for _ in range(level + 3)]
    prompt = f"Sort in ascending order: {' '.join(map(str, numbers))}"
    return prompt, " ".join(map(str, sorted(numbers)))


def _countdown(draw: Draw, level: int) -> tuple[str, str]:
    while True:
        numbers = [draw.between(1, 25) for _ in range(level + 2)]
        value = Fraction(numbers[0])
        for number in numbers[1:]:
            operation = draw.one_of("+-*/")
            if operation == "+":
                value += number
            elif operation == "-":
                value -= number
            else:
                value = value * number if operation == "*" else value / number
        if value.denominator == 1 and 0 < value < 1000 and value not in numbers:
            break
    shown = sorted(numbers)
    prompt = (
        f"Use {', '.join(map(str, shown))}, each at most once, with + - * / and brackets to make {value}."
    )
    return prompt, f"{value}: {' '.join(map(str, shown))}"


def _letters(draw: Draw, level: int) -> tuple[str, str]:
    some = "".join(draw.one_of("abcdefghijklmnopqrstuvwxyz") for _ in range(3))
    word = "".join(draw.one_of(some + "aeiou") for _ in range(4 + 2 * level))
    letter = draw.one_of(word)
    return f'How many times does the letter "{letter}" occur in "{word}"?', str(word.count(letter))


def _rounds(draw: Draw, level: int) -> tuple[str, str]:
    start, rounds = draw.between(0, 9), draw.between(level, level + 1)
    digits = [draw.between(1, 9) for _ in range(5)]
    added = "".join(f"{name}{digit}" for name, digit in zip("abcde", digits, strict=True))
    return f"{start}; {rounds} rounds of {added}", str((start + rounds * sum(digits)) % 10)


def _oldest(draw: Draw, level: int) -> tuple[str, str]:
    order = draw.shuffled(_NAMES)[: level + 2]
    facts = [
        f"{older} is older than {younger}." if draw.between(0, 1) else f"{younger} is younger than {older}."
        for older, younger in pairwise(order)
    ]
    place = draw.one_of(["oldest", "youngest"])
    answer = order[0] if place == "oldest" else order[-1]
    return f"{' '.join(draw.shuffled(facts))} Who is the {place}?", answer


GENERATORS: Final[dict[str, Generator]] = {
    "chain": Generator("a chain of + - * over whole numbers", _chain, "numeric"),
    "linear": Generator("a linear equation with a whole solution", _linear, "numeric"),
    "gcd": Generator("the greatest common divisor of two numbers", _gcd, "numeric"),
    "lcm": Generator("the least common multiple of two numbers", _lcm, "numeric"),
    "base": Generator("a decimal number in another base", _base, "exact"),
    "sort": Generator("numbers in ascending order", _sort, "exact"),
    "countdown": Generator("an expression with a given value", _countdown, "countdown"),
    "letters": Generator("how often a letter occurs in a word", _letters, "numeric"),
    "rounds": Generator("five digits added in turn, round after round: the last digit", _rounds, "numeric"),
    "oldest": Generator("the first or last of a chain of comparisons", _oldest, "exact"),
}
