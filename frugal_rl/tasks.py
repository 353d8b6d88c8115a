"""Built-in tasks: problems made by a rule, with nothing to download, and split without a list.

A task makes its rows itself, as a data file would hold them: dicts with a "prompt" and an "answer".
`last-digit` asks for the last digit of a sum of 4 to 7 digits:

    last digit of 7+8+6+9?     ->  0
    worked by a chain of look-ups: 7+8=15;5+6=11;1+9=10;0

The others come from generators.py, with a difficulty from 1: `gcd`, `gcd:3`, and from reasoning-gym, with
the extra `gym`: `gym:NAME` (gym.py).

Invariants
- A problem is held out if the hash of its text says so (`is_heldout`): one predicate for everything
  that draws problems, the training rows and the tool that teaches the embedded model alike, so a
  held-out problem is in no training set, of any seed or size.
- Rows are the same on every machine and Python: they are drawn with `random.Random(seed).random()`,
  the one sequence that Python promises to keep.
- Rows of a split are distinct; the answer is the whole of what a verifier compares.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from .errors import InputError
from .generators import GENERATORS, HARDEST, Draw, Generator
from .gym import PREFIX, gym_rows

Row = dict[str, str]

TRAIN_ROWS: Final = 4_000
HELDOUT_ROWS: Final = 500
MOST_DRAWS: Final = 200_000  # of a generator, for one split
FEWEST_TERMS: Final = 4  # shorter sums are so few that training would meet them all
MOST_TERMS: Final = 7  # the longest working has 43 characters


@dataclass(frozen=True)
class Task:
    """A built-in source of problems; `reward` names the built-in verifier that its answers need."""

    name: str
    description: str
    rows: Callable[[str], list[Row]]
    reward: str


def is_heldout(prompt: str) -> bool:
    """Whether the problem with this text is kept from all training (one in sixteen is)."""
    return hashlib.sha256(prompt.encode()).digest()[0] < 16


def last_digit_problems(seed: int, *, heldout: bool) -> Iterator[Row]:
    """An endless stream of problems of one side of the split; problems may come again."""
    source = random.Random(seed)

    def draw(lowest: int, highest: int) -> int:
        return lowest + int(source.random() * (highest - lowest + 1))

    while True:
        terms = [draw(1, 9) for _ in range(draw(FEWEST_TERMS, MOST_TERMS))]
        prompt = f"last digit of {'+'.join(map(str, terms))}?"
        if is_heldout(prompt) == heldout:
            yield {"prompt": prompt, "answer": str(sum(terms) % 10)}


def last_digit_rows(split: str) -> list[Row]:
    """The rows of "train" or "heldout": distinct, always the same, in random order of length."""
    if split not in ("train", "heldout"):
        raise InputError(f"task last-digit: split {split!r} does not exist; use 'train' or 'heldout'")
    heldout = split == "heldout"
    wanted = HELDOUT_ROWS if heldout else TRAIN_ROWS
    rows: dict[str, Row] = {}
    for row in last_digit_problems(seed=int(heldout), heldout=heldout):
        rows.setdefault(row["prompt"], row)
        if len(rows) == wanted:
            break
    return list(rows.values())


TASKS: Final[dict[str, Task]] = {
    "last-digit": Task(
        name="last-digit",
        description="the last digit of a sum of 4 to 7 digits (4,000 to train on, 500 held out)",
        rows=last_digit_rows,
        reward="last",
    )
}


def find_task(name: str) -> Task | None:
    """The task of that name, `NAME:DIFFICULTY` of a generator or `gym:NAME`; None if there is none.

    Raises: InputError for a difficulty that does not exist.
    """
    if name in TASKS:
        return TASKS[name]
    kind, colon, dial = name.partition(":")
    if name.startswith(PREFIX):
        return Task(
            name=name,
            description=f"reasoning-gym's {dial}",
            rows=lambda split: _gym_rows(dial)[split],
            reward="gym",
        )
    generator = GENERATORS.get(kind)
    if generator is None:
        return None
    if colon and not (dial.isascii() and dial.isdigit() and 1 <= int(dial) <= HARDEST):
        raise InputError(f"task {name!r}: the difficulty is a whole number from 1 to {HARDEST}")
    level = int(dial) if colon else 1
    return Task(
        name=name,
        description=f"{generator.description}, difficulty {level}",
        rows=lambda split: _generated_rows(name, generator, level, split),
        reward=generator.reward,
    )


def task_names() -> list[str]:
    """Every task, those with a dial without it."""
    return sorted({*TASKS, *GENERATORS})


@functools.cache
def _gym_rows(name: str) -> dict[str, list[Row]]:
    return gym_rows(name, TRAIN_ROWS, HELDOUT_ROWS)


def _generated_rows(name: str, generator: Generator, level: int, split: str) -> list[Row]:
    """Distinct prompts of one side of the split. The two sides draw from seeds of their own."""
    if split not in ("train", "heldout"):
        raise InputError(f"task {name}: split {split!r} does not exist; use 'train' or 'heldout'")
    heldout = split == "heldout"
    wanted = HELDOUT_ROWS if heldout else TRAIN_ROWS
    draw = Draw(2 * level + int(heldout))
    rows: dict[str, Row] = {}
    for _ in range(MOST_DRAWS):
        if len(rows) == wanted:
            break
        prompt, answer = generator.make(draw, level)
        if is_heldout(prompt) == heldout:
            rows.setdefault(prompt, {"prompt": prompt, "answer": answer})
    return list(rows.values())
