"""The built-in tasks with a dial: right answers by a second way, splits apart, rows that never change."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from fractions import Fraction

import pytest

from frugal_rl.errors import InputError
from frugal_rl.generators import GENERATORS, HARDEST, Draw
from frugal_rl.reward import Verifier
from frugal_rl.rewards.answers import Verdict
from frugal_rl.tasks import find_task, is_heldout, task_names

LEVELS = (1, 3, HARDEST)


@dataclass(frozen=True)
class Gold:
    answer: str


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"-?\d+", text)]


def divisors(n: int) -> set[int]:
    return {d for d in range(1, n + 1) if n % d == 0}


def solved(kind: str, prompt: str) -> str:
    """The answer from the text of the prompt, by another way than the generator's."""
    if kind == "chain":
        return str(eval(prompt.removeprefix("What is ").rstrip("?")))
    if kind == "linear":
        left, right = re.sub(r"(\d)x", r"\1*x", prompt.partition(": ")[2]).split("=")
        return next(str(x) for x in range(-300, 301) if eval(left, {"x": x}) == eval(right, {"x": x}))
    if kind == "gcd":
        a, b = numbers(prompt)
        return str(max(divisors(a) & divisors(b)))
    if kind == "lcm":
        a, b = numbers(prompt)
        return str(next(m for m in range(a, a * b + 1, a) if m % b == 0))
    if kind == "sort":
        rest, kept = numbers(prompt), []
        while rest:
            kept.append(rest.pop(rest.index(min(rest))))
        return " ".join(map(str, kept))
    if kind == "rounds":
        total, rounds, *digits = numbers(prompt)
        for _ in range(rounds):
            for digit in digits:
                total = (total + digit) % 10
        return str(total)
    if kind == "letters":
        letter, word = re.findall(r'"(\w+)"', prompt)
        return str(sum(one == letter for one in word))
    facts = re.findall(r"(\w+) is (older|younger) than (\w+)", prompt)
    pairs = {(a, b) if way == "older" else (b, a) for a, way, b in facts}
    people = {name for pair in pairs for name in pair}
    place = 1 if "oldest" in prompt else 0  # the oldest is nobody's younger one
    (one,) = people - {pair[place] for pair in pairs}
    return one


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", sorted(set(GENERATORS) - {"base", "countdown"}))
def test_every_answer_is_right(kind: str, level: int) -> None:
    draw = Draw(7)
    for _ in range(60):
        prompt, answer = GENERATORS[kind].make(draw, level)
        assert solved(kind, prompt) == answer, prompt


@pytest.mark.parametrize("level", LEVELS)
def test_digits_in_another_base_have_the_number_as_value(level: int) -> None:
    draw = Draw(7)
    for _ in range(60):
        prompt, answer = GENERATORS["base"].make(draw, level)
        number, base = numbers(prompt)
        assert int(answer, base) == number and not answer.startswith("0")


def reachable(values: tuple[Fraction, ...]) -> set[Fraction]:
    """Everything that some of the numbers make, by trying all pairs."""
    found = set(values)
    for i, j in itertools.permutations(range(len(values)), 2):
        rest = tuple(v for k, v in enumerate(values) if k not in (i, j))
        a, b = values[i], values[j]
        for value in (a + b, a - b, a * b, *([a / b] if b else [])):
            found |= reachable((*rest, value))
    return found


def test_every_countdown_has_a_solution() -> None:
    draw = Draw(7)
    for _ in range(40):
        _, answer = GENERATORS["countdown"].make(draw, 1)
        target, *given = numbers(answer)
        assert Fraction(target) in reachable(tuple(map(Fraction, given)))


@pytest.mark.parametrize("kind", sorted(GENERATORS))
def test_splits_are_apart_distinct_and_as_large_as_stated(kind: str) -> None:
    task = find_task(kind)
    assert task is not None
    train, heldout = ([row["prompt"] for row in task.rows(split)] for split in ("train", "heldout"))
    assert len(set(train)) == len(train) == 4000 and len(set(heldout)) == len(heldout) == 500
    assert not any(map(is_heldout, train)) and all(map(is_heldout, heldout))
    assert task.rows("heldout") == task.rows("heldout")


@pytest.mark.parametrize("kind", sorted(set(GENERATORS) - {"countdown"}))
def test_its_reward_takes_the_answer_and_no_other(kind: str) -> None:
    task = find_task(f"{kind}:2")
    assert task is not None
    rows = task.rows("heldout")[:50]
    with Verifier(task.reward) as verifier:
        right = verifier.judge((Gold(r["answer"]), f"Let me see.\n{r['answer']}") for r in rows)
        wrong = verifier.judge((Gold(r["answer"]), f"Let me see.\n{r['answer']}1") for r in rows)
    assert {one.verdict for one in right} == {Verdict.CORRECT}
    assert {one.verdict for one in wrong} == {Verdict.WRONG}


def test_the_dial_of_rounds_makes_the_working_longer() -> None:
    def rounds(level: int) -> list[int]:
        draw = Draw(7)
        return [numbers(GENERATORS["rounds"].make(draw, level)[0])[1] for _ in range(100)]

    for level in range(1, HARDEST + 1):
        assert (min(rounds(level)), max(rounds(level))) == (level, level + 1)


@pytest.mark.parametrize("kind", sorted(set(GENERATORS) - {"rounds"}))
def test_the_dial_makes_problems_longer(kind: str) -> None:
    def length(level: int) -> int:
        draw = Draw(7)
        return sum(len(GENERATORS[kind].make(draw, level)[0]) for _ in range(100))

    assert length(1) < length(4) < length(HARDEST)


def test_rows_are_those_recorded() -> None:
    """Golden: a change here changes every recorded score."""
    rows = {kind: GENERATORS[kind].make(Draw(1), 2) for kind in sorted(GENERATORS)}
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == "f0e4f4e5d7fc7b1d", rows


@pytest.mark.parametrize("name", ["gcd:0", "gcd:11", "gcd:", "gcd:x", "gcd:²"])
def test_a_difficulty_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="from 1 to 10"):
        find_task(name)


def test_tasks_are_found_by_name() -> None:
    assert find_task("nothing") is None and find_task("last-digit") is not None
    assert {"gcd", "last-digit"} <= set(task_names()) and len(GENERATORS) >= 8
