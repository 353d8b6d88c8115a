"""spoken.py: numbers, days and times in words, read as a person reads them."""

from __future__ import annotations

from fractions import Fraction

import pytest

from frugal_rl.rewards.spoken import date, number, same_time, time, whole_number

BELOW_TWENTY = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen"""
ROUND = "twenty thirty forty fifty sixty seventy eighty ninety"
ONES, TENS = BELOW_TWENTY.split(), ROUND.split()


def spelled(n: int) -> str:
    """The slow twin: by division."""
    for size, name in ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if n >= size:
            rest = n % size
            return f"{spelled(n // size)} {name}" + (f" {spelled(rest)}" if rest else "")
    if n < 20:
        return ONES[n]
    return TENS[n // 10 - 2] + (f"-{ONES[n % 10]}" if n % 10 else "")


def test_every_whole_number_is_read_as_it_is_spelled() -> None:
    numbers = [*range(1_200), *range(1_200, 10**6, 7_919), *range(10**6, 10**9, 99_999_989)]
    assert [whole_number(spelled(n)) for n in numbers] == numbers


@pytest.mark.parametrize(
    "text",
    [
        "",
        "and",
        "hundred",
        "five six",
        "twenty eleven",
        "zero one",
        "one thousand two million",
        "ten ten",
        "and one",
    ],
)
def test_what_is_no_number_is_none(text: str) -> None:
    assert whole_number(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("one hundred and five", 105),
        ("half", Fraction(1, 2)),
        ("one half", Fraction(1, 2)),
        ("a third", Fraction(1, 3)),
        ("three-quarters", Fraction(3, 4)),
        ("five sixths", Fraction(5, 6)),
        ("minus two", -2),
        ("negative one half", Fraction(-1, 2)),
        ("third", None),  # perhaps the third of a row
        ("zero thirds", None),
        ("many", None),
    ],
)
def test_fractions_and_signs(text: str, value: Fraction | int | None) -> None:
    assert number(text) == value


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("june 5", (6, 5, None)),
        ("5 june", (6, 5, None)),
        ("the 5th of june", (6, 5, None)),
        ("jun. 5th, 2020", (6, 5, 2020)),
        ("monday, june 5; 2020", (6, 5, 2020)),
        ("may 1", (5, 1, None)),
        ("june", None),
        ("5", None),
        ("june 5 and 6", None),
    ],
)
def test_days(text: str, day: tuple[int, int, int | None] | None) -> None:
    assert date(text) == day


def test_a_time_without_its_half_of_the_day_contradicts_only_another_hour() -> None:
    def same(gold: str, answer: str) -> bool:
        one, other = time(gold), time(answer)
        assert one is not None and other is not None
        return same_time(one, other)

    assert same("3:30 p.m.", "3:30") and same("3:30", "3:30 pm") and same("3:30 p.m.", "15:30")
    assert same("12 noon", "12:00 pm") and same("midnight", "0:00") and same("6 pm", "18:00")
    assert not same("3:30 p.m.", "3:30 am") and not same("3:30 am", "15:30") and not same("3:30", "3:31")
    assert not same("15:30", "3:30") and not same("midnight", "noon")
