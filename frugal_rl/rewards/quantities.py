r"""Numbers written out, as exact fractions, with a percent sign, a base or a unit.

Law: a Quantity is read from normalised text (answers.py) or the text is none; its value is a `Fraction`,
so 0.333 is not 1/3, and 0.\overline{3} is. Equal is equal in value, base and unit:

- a unit on one side only is no contradiction (the question names it), two different ones are, unless
  they measure the same: 60 minutes are 1 hour, 50 cents are 0.50 dollars.
- `5\%` is 0.05, and 5 where the other side is a whole number or the gold itself is a percentage
  ("what percent ...": 44).
- a base on one side only is no contradiction if the gold has it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Final

_INT = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?!\d)|\d+)"
_DECIMAL = re.compile(rf"([+-]?)({_INT}(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d{{1,3}}))?", re.ASCII)
_ENDLESS = re.compile(r"([+-]?)(\d*)\.(\d*)\\(?:overline|bar|dot)\{(\d+)\}", re.ASCII)
_DOTS = re.compile(r"([+-]?)(\d*)\.(\d*?)(\d{1,6}?)\4{2,}(?:\\[lc]?dots|\.\.\.|…)", re.ASCII)
_POWER_OF_TEN = re.compile(r"(?:\\times|\\cdot|\*)\s*10\^\{([+-]?\d{1,3})\}", re.ASCII)
_FRACTION = re.compile(rf"([+-]?)\\frac\{{([+-]?{_INT})\}}\{{([+-]?{_INT})\}}", re.ASCII)
_SLASHED = re.compile(rf"([+-]?)({_INT})/({_INT})(?![A-Za-z\\(])", re.ASCII)
_MIXED = re.compile(r"([+-]?)(\d+)(?:\\frac\{(\d+)\}\{(\d+)\}| (\d+)/(\d+))", re.ASCII)
NUMBER: Final = re.compile("|".join(p.pattern for p in (_FRACTION, _SLASHED, _DECIMAL)), re.ASCII)
_BASED = re.compile(
    r"([+-]?)\(?([0-9A-F][0-9A-F ,]*)\)?_(?:\{(?:\\text\{)?(\w+)\}?\}|(\d))(?:\\text\{base\})?", re.ASCII
)
_UNIT = re.compile(
    r"(?: ?\\text\{([^{}]*)\}|(\^\\circ)(?: ?\\text\{([CFK])\}| ?([CFK]))?"
    r"| ?((?:cm|mm|km|kg|mph|ft|lbs?|mL|ml)(?![A-Za-z])|(?<= )[A-Za-z]{2,}(?:[ /][A-Za-z]+){0,3}"
    r"|(?<= )[mgsL]))"
    r"(?:\^\{(\d)\})?",
    re.ASCII,
)
TEXT: Final = re.compile(r"\\text\s*\{([^{}]*)\}")
_NOT_UNITS = re.compile(
    r"\b(?:or|and|not|pi|mod|more|less|least|most|if|is|are|but|nor|than|to|sqrt|sin|cos|tan|log|ln|about"
    r"|tenths?|halves|half|thirds|fourths|fifths|sixths|eighths|hundredths|thousandths|factorial|ish|k"
    r"|approximately|maybe|perhaps|possibly|probably|likely|roughly|nearly|almost|guess|think|believe|suppose"
    r"|unsure|unless|except|plus|minus|times|roots?|powers?|over|divided|either|between|wrong|incorrect)\b"
)
_COMPOUND_PART = re.compile(r"(\d+(?:\.\d+)?) ?([a-z]+)", re.ASCII)
_COMPOUND = re.compile(rf"{_COMPOUND_PART.pattern}(?:,? ?(?:and )?{_COMPOUND_PART.pattern})+", re.ASCII)
_SCALES: Final = {
    "dozen": 12,
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
# What a unit measures, and how much of it; by its names. Exact: the inch is 0.0254 m.
_UNITS_TABLE: Final = """
length m meter metre|1 cm centimeter centimetre|1/100 mm millimeter millimetre|1/1000
length km kilometer kilometre|1000 ft foot feet|381/1250 in inch inche|127/5000
length yd yard|1143/1250 mi mile|201168/125
time s sec second|1 min minute|60 h hr hour|3600 day|86400 week|604800
money dollar usd buck|1 cent penny pennie|1/100
mass g gram|1 kg kilogram|1000 mg milligram|1/1000
pound lb pound|1 ounce oz|1/16
volume l liter litre|1 ml milliliter millilitre|1/1000
sterling sterling|1
euro euro eur|1
angle degree|1
temperatureC degreec|1
temperatureF degreef|1
temperatureK kelvin|1
"""


def _table() -> dict[str, tuple[str, Fraction]]:
    known: dict[str, tuple[str, Fraction]] = {}
    for line in _UNITS_TABLE.strip().splitlines():
        dimension, rest = line.split(" ", 1)
        for names, size in re.findall(r"([a-z ]+)\|([\d/]+)", rest):
            known.update((name, (dimension, Fraction(size))) for name in names.split())
    return known


_KNOWN: Final = _table()
_VAGUE: Final = frozenset({"unit", "total", "way", "time", "each", "of", "th", "st", "nd", "rd", "about"})


@dataclass(frozen=True)
class Quantity:
    """A number written out. `places` counts the digits after its point, if it has one."""

    value: Fraction
    unit: str = ""
    percent: bool = False
    base: str = ""  # as written; the value is then the digits read as decimal, if they are
    places: int | None = None


def words(text: str) -> str:
    r"""The text without its `\text{}` wrappers, in small letters."""
    return re.sub(r"\s+", " ", TEXT.sub(r" \1 ", text)).strip().casefold()


def _integer(digits: str) -> int:
    return int(digits.replace(",", "").replace(" ", ""))


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def _number(text: str) -> tuple[Quantity, str] | None:
    """The number at the start of the text, and what follows it."""
    if match := _MIXED.match(text):
        above, below = int(match[3] or match[5]), int(match[4] or match[6])
        if not 0 < above < below:
            return None
        value = int(match[2]) + Fraction(above, below)
        return Quantity(_signed(match[1], value)), text[match.end() :]
    if match := _FRACTION.match(text) or _SLASHED.match(text):
        if _integer(match[3]) == 0:
            return None
        value = Fraction(_integer(match[2]), _integer(match[3]))
        return Quantity(_signed(match[1], value)), text[match.end() :]
    if match := _BASED.match(text):
        digits = match[2].replace(" ", "").replace(",", "")
        value = Fraction(int(digits) if digits.isdigit() else int(digits, 16))
        return Quantity(_signed(match[1], value), base=_base(match[3] or match[4])), text[match.end() :]
    if match := _ENDLESS.match(text) or _DOTS.match(text):
        whole, start, period = match[2], match[3], match[4]
        tail = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(start))
        value = Fraction(int(whole + start or "0"), 10 ** len(start)) + tail
        return Quantity(_signed(match[1], value)), text[match.end() :]
    if match := _DECIMAL.match(text):
        whole, point, after = match[2].replace(",", "").replace(" ", "").partition(".")
        value = Fraction(int(whole + after or "0"), 10 ** len(after)) * Fraction(10) ** int(match[3] or 0)
        rest = text[match.end() :]
        if power := _POWER_OF_TEN.match(rest):
            value *= Fraction(10) ** int(power[1])
            rest = rest[power.end() :]
        return Quantity(_signed(match[1], value), places=len(after) if point else None), rest
    return None


def _base(name: str) -> str:
    names = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    return str(names.index(name) + 2) if name in names else name


def _compound(text: str) -> Quantity | None:
    """`3 hours 30 minutes`, `5 feet and 7 inches`: parts of one kind, each smaller than the one before."""
    said = words(text)
    if not _COMPOUND.fullmatch(said):
        return None
    parts = [
        (Fraction(number), _KNOWN.get(unit) or _KNOWN.get(unit.rstrip("s")))
        for number, unit in _COMPOUND_PART.findall(said)
    ]
    sizes = [known[1] for _, known in parts if known is not None]
    kinds = {known[0] for _, known in parts if known is not None}
    if len(sizes) < len(parts) or len(kinds) > 1 or any(a <= b for a, b in pairwise(sizes)):
        return None
    total = sum((number * size for (number, _), size in zip(parts, sizes, strict=True)), Fraction(0))
    name = _COMPOUND_PART.findall(said)[0][1]
    return Quantity(total / sizes[0], unit=name if name in _KNOWN else name.rstrip("s"))


def quantity(text: str) -> Quantity | None:
    """A normalised text that is a number, with at most a percent sign or a unit after it."""
    found = _number(text)
    if found is None:
        return None
    number, rest = found
    if not rest:
        return number
    if rest == r"\%" or words(rest) in ("percent", "per cent", "percentage"):
        return Quantity(number.value, percent=True, places=number.places)
    if number.base:
        return None
    unit = unit_of(rest)
    if unit is None:
        return _compound(text)
    value = number.value
    first, _, others = unit.partition(" ")
    if first in _SCALES:
        value, unit = value * _SCALES[first], others
    return Quantity(value, unit=unit, places=number.places)


def unit_of(text: str) -> str | None:
    r"""The unit that a text such as ` \text{sq. cm}` or `cm^{2}` names, in one spelling; None for no unit."""
    match = _UNIT.fullmatch(text)
    scale = ""
    if match is None:  # \text{dollars} after a scale: 1.5 \text{million dollars} in two pieces
        parts = TEXT.findall(text)
        if not parts or TEXT.sub("", text).strip() or len(parts) > 3:
            return None
        name, power = " ".join(parts), ""
    else:
        name, power = match[1] or match[5] or "", match[6] or ""
    name = name.replace("~", " ").strip().casefold()
    if match is not None and match[2]:
        name = "degree" + (match[3] or match[4] or "").casefold()
    if match is not None and match[5] and name not in _KNOWN and not re.search("[aeiou]", name):
        return None  # 5 xy is a product
    if _NOT_UNITS.search(name) or not re.fullmatch(r"[a-z][a-z .'/()-]*", name):
        return None
    name = re.sub(r"\bper\b", "/", name.replace("mph", "miles/hour")).replace(" /", "/").replace("/ ", "/")
    powers = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cu": "3", "cubed": "3"}
    kept = []
    for word in re.findall(r"[a-z'()-]+|/", name):
        if word in powers and not power:
            power = powers[word]
        elif word in _SCALES or word.rstrip("s") in _SCALES:
            scale = word.rstrip("s") if word not in _SCALES else word
        else:
            kept.append(word if word in _KNOWN else word.rstrip("s") or word)
    if power and not kept:  # 5 squared
        return None
    unit = " ".join(kept).replace(" / ", "/") + (f"^{power}" if power else "")
    return f"{scale} {unit}".strip() if scale else unit


def _measure(unit: str) -> tuple[str, Fraction] | None:
    """What a unit measures and how much of it, for units of the table and their powers and quotients."""
    body, _, power = unit.partition("^")
    dimension, size = "", Fraction(1)
    for place, part in enumerate(body.split("/")):
        if part not in _KNOWN:
            return None
        name, one = _KNOWN[part]
        dimension += ("/" if place else "") + name
        size = size / one if place else size * one
    exponent = int(power or 1)
    return f"{dimension}^{exponent}", size**exponent


def unit_ratio(gold: str, answer: str) -> Fraction | None:
    """How many gold units an answer's unit is; None if they do not measure the same."""
    if not gold or not answer or gold == answer:
        return Fraction(1)
    known, other = _measure(gold), _measure(answer)
    if known and other:
        return other[1] / known[1] if known[0] == other[0] else None
    mine, theirs = (set(re.findall(r"[a-z]+", unit)) for unit in (gold, answer))
    vague = _VAGUE & (mine | theirs) or mine & theirs
    return Fraction(1) if vague and not (known or other) else None


def has_scale(unit: str) -> bool:
    """Whether a unit such as `million dollars` or `dozen` multiplies the number before it."""
    return unit.partition(" ")[0] in _SCALES


def same_quantity(gold: Quantity, answer: Quantity) -> str | None:
    """None if they are equal, else what is different."""
    if gold.base or answer.base:
        bases = {gold.base or "10", answer.base or "10"}
        same = gold.value == answer.value and (len(bases) == 1 or (gold.base and not answer.base))
        return None if same else "other digits, or another base"
    ratio = unit_ratio(gold.unit, answer.unit)
    if ratio is None:
        return f"the unit is {answer.unit}, not {gold.unit}"
    if (gold.percent and answer.unit) or (gold.unit and answer.percent):
        return "a percentage and a unit"
    if gold.percent == answer.percent:
        return None if gold.value == answer.value * ratio else "another number"
    hundredth = Fraction(1, 100)
    true_gold = gold.value * (hundredth if gold.percent else 1)
    true_answer = answer.value * (hundredth if answer.percent else 1)
    droppable = gold.percent or gold.value.denominator == 1  # "what percent ...": 44 for 44 %
    same = true_gold == true_answer or (droppable and gold.value == answer.value)
    return None if same else "another number"
