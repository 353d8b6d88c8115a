"""What people say in words: numbers, days of the year, times of day. Texts in small letters."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

_FIRST: Final = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen"""
_UNITS: Final = {word: number for number, word in enumerate(_FIRST.split())}
_TENTH: Final = "twenty thirty forty fifty sixty seventy eighty ninety"
_TENS: Final = {word: 10 * number for number, word in enumerate(_TENTH.split(), 2)}
_SCALES: Final = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_ALL_MONTHS: Final = (
    """january february march april may june july august september october november december"""
)
_MONTHS: Final = _ALL_MONTHS.split()
_MONTH = "|".join(f"{month[:3]}(?:{month[3:]})?" for month in _MONTHS)
_WEEKDAY = r"(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day,? )?"
_DAY = r"(?:the )?(\d{1,2})(?: ?(?:st|nd|rd|th))?"
_YEAR = r"(?: ?[,;]? ?(\d{4}))?"
_DATES = (
    (re.compile(rf"{_WEEKDAY}({_MONTH})\.? ?{_DAY}{_YEAR}", re.ASCII), (1, 2, 3)),
    (re.compile(rf"{_WEEKDAY}{_DAY} ?(?:of )?({_MONTH})\.?{_YEAR}", re.ASCII), (2, 1, 3)),
)
_TIME = re.compile(r"(\d{1,2})(?:[:.](\d\d))? ?([ap])\.? ?m\.?", re.ASCII)
_CLOCK = re.compile(r"0?(\d{1,2}):(\d\d)(?: ?(?:h|hours|o'clock))?", re.ASCII)


def whole_number(text: str) -> int | None:
    """`twenty-one`, `one hundred and five`, `two thousand`; None for anything else."""
    said = re.split(r"[ -]+", text)
    if "and" in (said[0], said[-1]):
        return None
    said = [word for word in said if word != "and"]
    total, part, last = 0, 0, ""
    for word in said:
        if word in _TENS and part % 100 == 0 and last not in _TENS:
            part += _TENS[word]
        elif word in _UNITS and (part % 100 == 0 or (last in _TENS and 0 < _UNITS[word] < 10)):
            part += _UNITS[word]
        elif word == "hundred" and 0 < part < 100:
            part *= 100
        elif word in _SCALES and 0 < part < 1000 and (not total or total % (_SCALES[word] * 1000) == 0):
            total, part = total + part * _SCALES[word], 0
        else:
            return None
        last = word
    return total + part if "zero" not in said or len(said) == 1 else None


_PARTS: Final = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6} | {
    "seventh": 7,
    "eighth": 8,
    "ninth": 9,
    "tenth": 10,
    "hundredth": 100,
}


def number(text: str) -> Fraction | None:
    """A whole number, or `half`, `a third`, `three quarters`, `minus two`."""
    for sign in ("minus ", "negative "):
        if text.startswith(sign):
            value = number(text.removeprefix(sign))
            return None if value is None else -value
    whole = whole_number(text)
    if whole is not None:
        return Fraction(whole)
    above, _, part = text.replace("-", " ").rpartition(" ")
    below = _PARTS.get(part.removesuffix("s"))
    count = 1 if above in ("", "a", "one") else whole_number(above)
    if below is None or not count or (above == "" and part != "half"):
        return None
    return Fraction(count, below)


def date(text: str) -> tuple[int, int, int | None] | None:
    """Month, day and year, where it is said, of `June 5th, 2020` or `5 June`."""
    for pattern, (month, day, year) in _DATES:
        if found := pattern.fullmatch(text):
            number = next(n for n, name in enumerate(_MONTHS, 1) if name.startswith(found[month][:3]))
            return number, int(found[day]), int(found[year]) if found[year] else None
    return None


def time(text: str) -> tuple[int, int, str] | None:
    """Hour, minute and half of the day ("a", "p"; "" where it is not said) of `3:30 p.m.` or `15:30`."""
    if text in ("noon", "12:00 noon", "12 noon", "midnight", "12:00 midnight"):
        return 12, 0, "p" if "noon" in text else "a"
    if found := _TIME.fullmatch(text):
        return int(found[1]), int(found[2] or 0), found[3]
    if found := _CLOCK.fullmatch(text):
        return int(found[1]), int(found[2]), ""
    return None


def same_time(gold: tuple[int, int, str], answer: tuple[int, int, str]) -> bool:
    """A half of the day that one side leaves out is no contradiction; 15:30 is 3:30 p.m."""
    (hour, minute, half), (hour2, minute2, half2) = gold, answer
    if minute != minute2:
        return False
    if half and half2:
        return (hour, half) == (hour2, half2)
    if hour == hour2:
        return True
    one, other, said = (hour, hour2, half) if half else (hour2, hour, half2)
    return bool(said) and one <= 12 and other == one % 12 + 12 * (said == "p")
