r"""Where a response's answer is, and whether it is the gold answer, as far as exact reading can tell.

Law: what is Decided here is exact: strings, and integers, decimals and fractions as `Fraction`. What
only algebra can tell is Undecided, and left to `sympy_equal`, which runs in a worker (reward.py).
Work before a length check is linear in the text; sympy and math-verify are imported in workers alone.

Source: math-verify 0.9 (huggingface/Math-Verify, `grader.py`), gold first, both wrapped as `$...$`.
Differs: see reward.py.
"""

from __future__ import annotations

import enum
import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

ANSWER_CHARACTERS: Final = 300


class Verdict(enum.Enum):
    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True)
class Decided:
    verdict: Verdict
    detail: str = ""


@dataclass(frozen=True)
class Undecided:
    """Left to a worker: every one of `answers` must equal `gold`."""

    gold: str
    answers: tuple[str, ...]


Quick = Decided | Undecided
CORRECT: Final = Decided(Verdict.CORRECT)


def wrong(detail: str = "") -> Decided:
    return Decided(Verdict.WRONG, detail)


def no_answer(detail: str) -> Decided:
    return Decided(Verdict.NO_ANSWER, detail)


# ---- where the answer is ----

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""The inside of the `\boxed{}` that closes last; one never closed does not count. One pass."""
    opened: list[int | None] = []
    found: str | None = None
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "{":
            opened.append(None)
        elif token == "}":
            start = opened.pop() if opened else None
            if start is not None:
                found = text[start : match.start()]
        elif token.endswith("{") and len(token) > 2:
            opened.append(match.end())
    return found


def final_answer(response: str) -> str | None:
    r"""What a mark names as the answer: the last `\boxed{}`, else `#### N`, else `<answer>`."""
    boxed = last_boxed(response)
    if boxed is not None:
        return boxed.strip()
    if "####" in response:
        return str(_HASHES.findall(response)[-1]).strip()
    if "</answer>" in response:
        tagged = _TAGGED.findall(response)
        if tagged:
            return str(tagged[-1]).strip()
    return None


def marked_or_last_line(response: str) -> str:
    marked = final_answer(response)
    if marked is not None:
        return marked
    stripped = response.strip()
    return stripped[stripped.rfind("\n") + 1 :].strip()


# ---- mathematical text in one form ----

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-", strict=True))
_SYMBOLS = dict.fromkeys("−–‐‑﹣－", "-") | dict.fromkeys("\u00a0\u2009\u202f\u2002\u2003", " ")
_SYMBOLS |= {"×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "±": r"\pm ", "°": r"^\circ "}
_SYMBOLS |= {"≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "∪": r"\cup ", "∩": r"\cap "}
_SYMBOLS |= {"∈": r"\in ", "∞": r"\infty ", "π": r"\pi ", "θ": r"\theta ", "％": r"\%"}
_SYMBOLS |= {"½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "，": ",", "．": "."}
_SQRT_SIGN = re.compile(r"√\s*(\(|\w+)")
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.ASCII), new)
    for pattern, new in (
        (r"(?<!\\)\$", ""),  # a bare dollar is a delimiter, \$ a currency
        (r"(?<!\\)\\[()\[\]]", ""),
        (r"\\\$", ""),
        (r"\\(?:left|right)\s*\.", ""),
        (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|limits)(?![a-zA-Z])", ""),
        (r"(?<!\\)\\!|\{\}", ""),
        (r"(?<=\d)\{,\}(?=\d)", ","),
        (r"(?<=\d)\\,(?=\d{3}(?!\d))", " "),
        (r"(?<!\\)\\[,;: ]|\\q?quad|~", " "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\frac\s*([0-9a-zA-Z]|\\pi)", r"\\frac{\1}"),
        (r"(\\frac\{[^{}]*\})\s*([0-9a-zA-Z]|\\pi)", r"\1{\2}"),
        (r"\\sqrt\s*([0-9a-zA-Z])", r"\\sqrt{\1}"),
        (r"\^\s*(\d+|[a-zA-Z])", r"^{\1}"),
        (r"^\s*\\approx", ""),
        (
            r"\\(?:textbf|textit|textrm|mbox|mathrm|mathbf|mathit|operatorname|hbox)\s*\{",
            r"\\text{",
        ),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree", r"^\\circ "),
        (r"(?<!\\)%", r"\\%"),
        (r"\\(?:le|leqslant)(?![a-zA-Z])", r"\\leq"),
        (r"\\(?:ge|geqslant)(?![a-zA-Z])", r"\\geq"),
        (r"\\(?:ne)(?![a-zA-Z])", r"\\neq"),
    )
)
_SPACE = re.compile(r"\s+")
_LOOSE_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")


def normalise(text: str) -> str:
    r"""One spelling of the same mathematics: no delimiters, no layout, `\frac{a}{b}`, ASCII digits.

    A space stays where it parts two letters or digits: `1 2` is not 12.
    """
    text = text.strip()
    if not text.isascii():
        text = _to_ascii(text)
    for _ in range(4):  # \boxed{\boxed{5}}, \text{\boxed{5}}
        inner = last_boxed(text)
        if inner is None:
            break
        text = inner
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    text = _SPACE.sub(" ", text).strip().rstrip(".,;:").strip()
    spaced = _TEXT.sub(lambda match: rf"\text{{{match.group(1).strip()}}}", text)
    return _strip_round_brackets(_LOOSE_SPACE.sub("", spaced))


def _to_ascii(text: str) -> str:
    parts: list[str] = []
    raised = False
    for character in text:
        if character in _SUPERSCRIPTS:
            parts.append(("" if raised else "^{") + _SUPERSCRIPTS[character])
            raised = True
            continue
        if raised:
            parts.append("}")
            raised = False
        if character.isdecimal():
            parts.append(str(unicodedata.digit(character)))
        else:
            parts.append(_SYMBOLS.get(character, character))
    text = "".join(parts) + ("}" if raised else "")
    return _SQRT_SIGN.sub(lambda m: r"\sqrt" + (m[1] if m[1] == "(" else f"{{{m[1]}}}"), text)


def _strip_round_brackets(text: str) -> str:
    """`(((5)))` is 5; `(1,2)` and `(1)(2)` stay."""
    while len(text) > 2 and text[0] == "(" and text[-1] == ")" and "," not in text:
        depths = list(itertools.accumulate((c == "(") - (c == ")") for c in text))
        if 0 in depths[:-1]:
            break
        text = text[1:-1].strip()
    return text


def words(text: str) -> str:
    r"""The text without its `\text{}` wrappers, in small letters."""
    return _SPACE.sub(" ", _TEXT.sub(r" \1 ", text)).strip().casefold()


# ---- quantities ----

_INT = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)"
_DECIMAL = re.compile(rf"([+-]?)({_INT}(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d{{1,3}}))?", re.ASCII)
_POWER_OF_TEN = re.compile(r"(?:\\times|\\cdot|\*)\s*10\^\{([+-]?\d{1,3})\}", re.ASCII)
_FRACTION = re.compile(rf"([+-]?)\\frac\{{([+-]?{_INT})\}}\{{([+-]?{_INT})\}}", re.ASCII)
_SLASHED = re.compile(rf"([+-]?)({_INT})/({_INT})", re.ASCII)
_MIXED = re.compile(r"([+-]?)(\d+)(?:\\frac\{(\d+)\}\{(\d+)\}| (\d+)/(\d+))", re.ASCII)
NUMBER = re.compile("|".join(p.pattern for p in (_FRACTION, _SLASHED, _DECIMAL)), re.ASCII)
_BASED = re.compile(r"([+-]?\d[\d ,]*)_(?:\{(?:\\text\{)?(\w+)\}?\}|(\d))", re.ASCII)
_UNIT = re.compile(
    r"(?: ?\\text\{([^{}]*)\}|(\^\\circ)(?:\\text\{([CF])\}|([CF]))?"
    r"| ([A-Za-z]{2,}(?: [A-Za-z]+){0,2}))"
    r"(?:\^\{(\d)\})?",
    re.ASCII,
)
_NOT_UNITS = re.compile(
    r"\b(?:or|and|not|pi|mod|more|less|least|most|if|is|are|but|nor|than|to|sqrt|sin|cos|tan|log|ln)\b"
)
_SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_UNIT_NAMES = """ft feet:foot in inches:inch usd:dollar hr hrs h:hour min mins:minute sec s:second
    mi:mile sq:square cm:centimeter km:kilometer m:meter lb lbs:pound kg:kilogram g:gram"""
_SAME_UNIT = {
    short: full
    for line in re.findall(r"([a-z ]+):([a-z]+)", _UNIT_NAMES.replace("\n", " "))
    for short, full in ((word, line[1]) for word in line[0].split())
}


@dataclass(frozen=True)
class Quantity:
    """A number written out. `places` counts the digits after its point, if it has one."""

    value: Fraction
    unit: str = ""
    percent: bool = False
    base: str = ""  # as written; the value is then the digits read as decimal
    places: int | None = None


def _integer(digits: str) -> int:
    return int(digits.replace(",", "").replace(" ", ""))


def _number(text: str) -> tuple[Quantity, str] | None:
    """The number at the start of the text, and what follows it."""
    if match := _MIXED.match(text):
        above, below = int(match[3] or match[5]), int(match[4] or match[6])
        if not 0 < above < below:
            return None
        value = int(match[2]) + Fraction(above, below)
        return Quantity(-value if match[1] == "-" else value), text[match.end() :]
    if match := _FRACTION.match(text) or _SLASHED.match(text):
        if _integer(match[3]) == 0:
            return None
        value = Fraction(_integer(match[2]), _integer(match[3]))
        return Quantity(-value if match[1] == "-" else value), text[match.end() :]
    if match := _BASED.match(text):
        return Quantity(Fraction(_integer(match[1])), base=match[2] or match[3]), text[match.end() :]
    if match := _DECIMAL.match(text):
        whole, point, after = match[2].replace(",", "").replace(" ", "").partition(".")
        value = Fraction(int(whole + after or "0"), 10 ** len(after)) * Fraction(10) ** int(match[3] or 0)
        rest = text[match.end() :]
        if power := _POWER_OF_TEN.match(rest):
            value *= Fraction(10) ** int(power[1])
            rest = rest[power.end() :]
        places = len(after) if point else None
        return Quantity(-value if match[1] == "-" else value, places=places), rest
    return None


def quantity(text: str) -> Quantity | None:
    """A normalised text that is a number, with at most a percent sign or a unit after it."""
    found = _number(text)
    if found is None:
        return None
    number, rest = found
    if not rest:
        return number
    if rest == r"\%" or words(rest) in ("percent", "per cent"):
        return Quantity(number.value, percent=True, places=number.places)
    match = _UNIT.fullmatch(rest)
    if match is None or number.base:
        return None
    name = words(match[1] or match[5] or "")
    if match[2]:
        name = "degree" + (match[3] or match[4] or "").casefold()
    singular = [_SAME_UNIT.get(w.rstrip("."), w.rstrip("s.")) for w in name.split()]
    value = number.value
    if singular and singular[0] in _SCALES:
        value *= _SCALES[singular.pop(0)]
    if _NOT_UNITS.search(name) or not name.replace(" ", "").isalpha():
        return None
    unit = " ".join(singular) + (f"^{match[6]}" if match[6] else "")
    return Quantity(value, unit=unit, places=number.places)


def same_quantity(gold: Quantity, answer: Quantity) -> Decided:
    """Exact, except that a fraction without end may be given as a decimal of six places or more."""
    if gold.base or answer.base:
        bases = {gold.base or "10", answer.base or "10"}
        same = gold.value == answer.value and (len(bases) == 1 or (gold.base and not answer.base))
        return CORRECT if same else wrong("other digits, or another base")
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return wrong(f"the unit is {answer.unit}, not {gold.unit}")
    if gold.value == answer.value and gold.percent == answer.percent:
        return CORRECT
    if gold.percent != answer.percent:
        hundredth = Fraction(1, 100)
        true_gold = gold.value * (hundredth if gold.percent else 1)
        true_answer = answer.value * (hundredth if answer.percent else 1)
        droppable = gold.percent or gold.value.denominator == 1  # "what percent ...": 44 for 44 %
        same = true_gold == true_answer or (droppable and gold.value == answer.value)
        return CORRECT if same else wrong()
    for exact, decimal in ((gold, answer), (answer, gold)):
        endless = exact.places is None and exact.value.denominator > 1
        if endless and decimal.places is not None and decimal.places >= 6:
            return CORRECT if round(exact.value, decimal.places) == decimal.value else wrong()
    return wrong()


# ---- the math reward ----

_RESTATED = re.compile(r"\\(?:int|iint|sum|prod|lim|max|min|gcd|lcm|binom|bmod|pmod|det)(?![a-zA-Z])")
_ALTERNATIVES = re.compile(r"(?<![a-z])(?:or|either|not|maybe|perhaps|more|less|least|most)(?![a-z])")
_APART = re.compile(r"(?<![0-9]{3})\d (?=\d)", re.ASCII)
_EQUALS = re.compile(r"(?<![<>!:\\])=+")
_COMMANDS = re.compile(r"\\(?:frac|sqrt|cdot|times|div|pi|left|right|text)(?![a-zA-Z])")
_MEMBER = re.compile(r"^[A-Za-z]\\in(?![a-zA-Z])")
_OPEN = {"(": "(", "[": "[", r"\{": "{"}
_CLOSE = {")": ")", "]": "]", r"\}": "}"}


@dataclass(frozen=True)
class Listed:
    """`brackets` is the pair around the items, "" for none."""

    brackets: str
    items: tuple[str, ...]


def split_list(text: str) -> Listed:
    """The parts between the outermost commas, and the brackets around them all."""
    pieces = re.findall(r"\\[{}]|[()\[\]{},;]|[^\\()\[\]{},;]+|\\", text)
    outer = ""
    if len(pieces) > 2 and pieces[0] in _OPEN and pieces[-1] in _CLOSE:
        depths = _depths(pieces)
        if min(depths[:-1]) > 0 and depths[-1] == 0:
            outer = _OPEN[pieces[0]] + _CLOSE[pieces[-1]]
            pieces = pieces[1:-1]
    items = [""]
    for piece, depth in zip(pieces, _depths(pieces), strict=True):
        if depth == 0 and piece in (",", ";"):
            items.append("")
        else:
            items[-1] += piece
    return Listed(outer, tuple(item.strip() for item in items))


def _depths(pieces: Sequence[str]) -> list[int]:
    depths, depth = [], 0
    for piece in pieces:
        depth += (piece in ("(", "[", "{", r"\{")) - (piece in (")", "]", "}", r"\}"))
        depths.append(depth)
    return depths


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
    if identical and (g == a or (len(a) > 1 and words(g) == words(a) and words(g).isalpha())):
        return CORRECT
    return _compare_equations(g, a)


def _compare_equations(gold: str, answer: str) -> Quick:
    """Takes `x = 5` apart, refuses `0 = 1 = 5`."""
    gold_sides = _EQUALS.split(gold)
    for part in split_list(answer).items:
        if len(_EQUALS.split(part)) > max(2, len(gold_sides)):
            return wrong("a chain of =")
    sides = [side.strip() for side in _EQUALS.split(answer)]
    if len(gold_sides) == len(sides) == 2 and gold_sides[0] == sides[0]:
        return _compare_values(gold_sides[1], sides[1])
    if len(gold_sides) == 2 and len(sides) == 1 and gold_sides[0].isalpha():
        return _compare_values(gold_sides[1], answer)
    if len(gold_sides) > 1 or len(sides) != 2:
        return _compare_values(gold, answer)
    named, value = sides
    if not named or re.search("[A-Za-z]", _COMMANDS.sub("", named)):
        return _compare_values(gold, value)
    both = [_compare_values(gold, side) for side in sides]  # 2+3=5 says 5 only if 2+3 is 5
    for one in both:
        if isinstance(one, Decided) and one.verdict is not Verdict.CORRECT:
            return wrong("an equation whose sides differ")
    open_ones = [one for one in both if isinstance(one, Undecided)]
    return Undecided(gold, tuple(a for one in open_ones for a in one.answers)) if open_ones else CORRECT


def _compare_values(gold: str, answer: str) -> Quick:
    if not answer:
        return wrong("nothing after =")
    gold_number, answer_number = quantity(gold), quantity(answer)
    if gold_number and answer_number:
        return same_quantity(gold_number, answer_number)
    for pattern, what in (
        (_RESTATED, "not worked out"),
        (_ALTERNATIVES, "alternatives"),
        (_APART, "numbers side by side"),
    ):
        if pattern.search(words(answer)) and not pattern.search(words(gold)):
            return wrong(what)
    if not _MEMBER.match(gold):
        answer = _MEMBER.sub("", answer)
    return _compare_lists(gold, answer)


def _compare_lists(gold: str, answer: str) -> Quick:
    g, a = split_list(gold), split_list(answer)
    if len(g.items) > 1 and len(a.items) > 1 and g.brackets and a.brackets and g.brackets != a.brackets:
        return wrong(f"in {a.brackets}, not in {g.brackets}")
    if len(g.items) > 1 and g.brackets and not a.brackets and len(a.items) > 1:
        answer = gold[: 1 + (gold[0] == "\\")] + answer + gold[-1 - (gold[-2] == "\\") :]
    numbers = [[quantity(item) for item in side.items] for side in (g, a)]
    if len(g.items) > 1 and all(n is not None for side in numbers for n in side):
        if len(g.items) != len(a.items):
            return wrong(f"{len(a.items)} values, not {len(g.items)}")
        gold_values, values = ([n for n in side if n is not None] for side in numbers)
        if g.brackets in ("", "{}"):
            gold_values, values = (sorted(v, key=lambda n: n.value) for v in (gold_values, values))
        pairs = zip(gold_values, values, strict=True)
        return CORRECT if all(same_quantity(x, y) == CORRECT for x, y in pairs) else wrong()
    return Undecided(gold, (answer,))


def sympy_equal(payload: dict[str, Any]) -> dict[str, str]:
    """Runs in a worker: whether math-verify finds every answer equal to the gold."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)

    def read(text: str) -> list[Any]:
        return list(parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None))

    def equal(gold: list[Any], answer: list[Any]) -> bool:
        return bool(
            verify(
                gold,
                answer,
                timeout_seconds=None,
                raise_on_error=True,
                allow_set_relation_comp=True,
            )
        )

    gold = read(payload["gold"])
    for text in payload["answers"]:
        answer = read(text)
        if not any(not isinstance(one, str) for one in answer):
            return {"verdict": "WRONG", "detail": "it is not an expression"}
        try:
            same = equal(gold, answer)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # sympy raises what it likes; whose fault it is, is found out here
            if not equal(gold, gold):
                raise
            return {
                "verdict": "WRONG",
                "detail": f"it cannot be compared: {type(error).__name__}: {error}",
            }
        if not same:
            return {"verdict": "WRONG", "detail": ""}
    return {"verdict": "CORRECT", "detail": ""}
