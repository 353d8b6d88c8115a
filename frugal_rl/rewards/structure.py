r"""Whether two normalised texts say the same mathematics: lists, intervals, equations, matrices, words.

Law: the structure is compared here, by rule; what has none left is asked of `leaf`, True, False or None
(unknown). The same walk runs twice: in the trainer with a leaf that knows only exact quantities, and if
that leaves anything unknown, in a worker with one that knows algebra (algebra.py).

- A bare list and a set have no order; a tuple has. Brackets that differ are a difference, except that a
  bare list may stand for a tuple in its order.
- `x = 5` says 5 where the left side is a name; `2x = 5` and `0 = 5` do not. Of `2 + 3 = 5` both sides
  count. Chains of `=` that the gold does not have are refused, as are alternatives and hedges.
- Inequalities of one variable are intervals, |x| < a too. |x| = a is two numbers.
- Days, times of day, and numbers in words are what they say (spoken.py).

Differs: math-verify calls `\{1,2\}` equal to the interval (1,2), `40 inches` to `40 feet`, `0=5` and
`0=1=5` to 5, "listen" to "silent" and 1.41421356 to \sqrt{2}.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from frugal_rl.rewards import spoken
from frugal_rl.rewards.quantities import TEXT, has_scale, quantity, same_quantity, unit_of, unit_ratio, words

Leaf = Callable[[str, str], bool | None]
T = TypeVar("T")

_OPEN: Final = {"(": "(", "[": "[", r"\{": "{"}
_CLOSE: Final = {")": ")", "]": "]", r"\}": "}"}
_PIECES = re.compile(
    r"\\begin\{\w+\*?\}|\\end\{\w+\*?\}|\\[A-Za-z]+|\\.|[()\[\]{},;=<>&]|[^\\()\[\]{},;=<>&]+", re.S
)
_CONNECTIVE = re.compile(r",? ?\\text\{,? ?(?:and|or|and/or)\}|(?<![A-Za-z]),? ?(?:and|or) ?(?![A-Za-z])")
_HEDGES = re.compile(
    r"(?<![a-z])(?:either|not|maybe|perhaps|more|less|least|most|about|approximately|wrong|i guess"
    r"|unsure)(?![a-z])"
)
_RESTATED = re.compile(
    r"\\(?:int|iint|sum|prod|lim|max|min|gcd|lcm|bmod|pmod|det|approx|[lc]?dots)(?![a-zA-Z])"
)
_APART = re.compile(r"(?<![0-9]{3})\d (?=\d)", re.ASCII)
_BASED = re.compile(r"\d_\{?\d", re.ASCII)
_MEMBER = re.compile(r"^[A-Za-z]\\in(?![a-zA-Z])")
_SET_BUILDER = re.compile(r"^\\\{([A-Za-z])(?:\\in\(-\\infty,\\infty\))?(?:\\mid|\\vert|\||:)(.*)\\\}$")
_NAME = re.compile(
    r"(?:m?\\angle ?)?"
    r"(?:\|?(?:[A-Za-z]|\\(?!frac|sqrt|text|pi(?![a-z]))[a-z]+|\\(?:overline|vec|hat|bar)\{\w+\})"
    r"(?:[A-Z]{0,3}|'*)(?:_(?:\{[\w,]+\}|\w))?'*"
    r"(?:\((?:[\w,.^{}+=<> -]|\\(?:cap|cup|mid|leq|geq|text\{[\w ]*\}))*\))?\|?|\\text\{[A-Za-z ()'.-]+\})"
    r"(?:\^\{-1\}\(\w\))?|\\frac\{d(?:\^\{\d\})?[a-z]?\}\{d[a-z](?:\^\{\d\})?\}"
)
_NAMES = re.compile(rf"(?:{_NAME.pattern})(?:[+-](?:{_NAME.pattern}))*")
_CHOICE = re.compile(r"^(?:\\text\{)?(?:option|choice|answer)? ?\(?([A-Ha-h])\)?[).:]?\}?$", re.IGNORECASE)
_LABELLED = re.compile(r"^(?:\\text\{)?(?:\(([A-H])\)|([A-H])[).:])\}?\s*(?:\\text\{)?(.+?)\}?$")
_LABEL = re.compile(r"\([A-H]\)|(?<![A-Za-z])[A-H][).]")
_TRAILING_UNIT = re.compile(
    r"^(.*[^ ])((?: ?\\text\{[^{}]*\}|(?<=[\d})]) [A-Za-z]{2,}(?: [a-z]+){0,2})(?:\^\{\d\})?)$"
)
_RATIO = re.compile(r"(\d+)(?::| ?to ?|\\text\{to\}|\\colon ?)(\d+)((?::\d+)*)")
_MATRIX = re.compile(
    r"^[(\[]?\\begin\{([pbBvV]?matrix|smallmatrix|array)\}(?:\{[clr|]+\})?(.*)\\end\{\1\}[)\]]?(\^\{T\})?$",
    re.S,
)
_SIZE_OF = re.compile(r"(?:\||\\[lr]?vert)\s*([a-z])\s*(?:\||\\[lr]?vert)")
_PM = re.compile(r"\\(pm|mp)(?![a-zA-Z])")
_RELATIONS = {"<": "<", ">": ">", r"\leq": "<=", r"\geq": ">="}
_NOTHING = re.compile(r"\\emptyset|(?:there (?:is|are) )?no(?: real)? solutions?|none|(?:the )?empty set")
_ENDLESS = re.compile(
    r"(?:there are )?(?:infinitely many|an infinite number of)(?: \w+)?|(?:positive )?infinity"
)
_EVERYTHING = re.compile(r"(?:(?:all|any|every) )?(?:the )?real(?: numbers?)?s?")
_ANGLE_OF = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_SPANNING = re.compile(r"\\cup|[<>]|\\leq|\\geq|\\neq|\\infty|\\mid|\\in(?![a-z])")
_SETS = re.compile(r"\\(?:setminus|cap|mathbb)|\\backslash")
_WRAPPED_LIST = re.compile(r"\\text\{([^{}]*,[^{}]*)\}")


_AND = r",? ?(?:\\text\{ ?and ?\}|and|\\wedge|\\land) ?"
_BETWEEN = re.compile(rf"^([^<>]+)(<|\\leq)([a-z]){_AND}\3(<|\\leq)([^<>]+)$")
_BETWEEN_TURNED = re.compile(rf"^([a-z])(>|\\geq)([^<>]+?){_AND}\1(<|\\leq)([^<>]+)$")


@dataclass(frozen=True)
class Listed:
    """`brackets` is the pair around the items, "" for none."""

    brackets: str
    items: tuple[str, ...]


@dataclass(frozen=True)
class Span:
    """An interval by the texts of its ends."""

    low: str
    high: str
    low_open: bool
    high_open: bool
    variable: str = ""


class Refused(Exception):
    """The answer is of a form that is WRONG whatever it is worth; the text says why."""


# ---- cutting text apart ----


def _depths(pieces: Sequence[str]) -> list[int]:
    depths, depth = [], 0
    for piece in pieces:
        depth += piece in ("(", "[", "{", r"\{") or piece.startswith(r"\begin{")
        depth -= piece in (")", "]", "}", r"\}") or piece.startswith(r"\end{")
        depths.append(depth)
    return depths


def split_top(text: str, marks: Sequence[str]) -> list[tuple[str, str]]:
    """The parts between marks outside all brackets, each with the mark before it ("" for the first)."""
    pieces = _PIECES.findall(text)
    parts: list[list[str]] = [["", ""]]
    for piece, depth in zip(pieces, _depths(pieces), strict=True):
        if depth == 0 and piece in marks:
            parts.append([piece, ""])
        else:
            parts[-1][1] += piece
    return [(mark, part.strip()) for mark, part in parts]


def split_list(text: str) -> Listed:
    """The parts between the outermost commas, and the brackets around them all."""
    pieces = _PIECES.findall(text)
    outer = ""
    if len(pieces) > 2 and pieces[0] in _OPEN and pieces[-1] in _CLOSE:
        depths = _depths(pieces)
        if min(depths[:-1]) > 0 and depths[-1] == 0:
            outer = _OPEN[pieces[0]] + _CLOSE[pieces[-1]]
            text = "".join(pieces[1:-1])
    items = tuple(part for _, part in split_top(text, (",", ";")) if part)
    return Listed(outer, items or ("",))


def sides(text: str) -> list[str]:
    """The texts between `=` signs outside brackets."""
    parts = [""]
    for mark, part in split_top(text, ("=",)):
        if mark:
            parts.append(part)
        else:
            parts[0] = part
    return [p for i, p in enumerate(parts) if p or i in (0, len(parts) - 1)]


# ---- the walk ----


def all_of(found: Sequence[bool | None]) -> bool | None:
    if False in found:
        return False
    return None if None in found else True


def compare(gold: str, answer: str, leaf: Leaf) -> bool | None:
    """Whether they are equal; None if the leaf does not know. Raises: Refused, RecursionError."""
    longest = max(len(sides(part)) for part in split_list(_listed_words(gold)).items)
    for part in split_list(_listed_words(answer)).items:
        if len(sides(part)) > max(2, longest):
            raise Refused("a chain of =")
    said = words(answer)
    for pattern, what in (
        (_RESTATED, "not worked out"),
        (_HEDGES, "a hedge"),
        (_APART, "numbers side by side"),
        (_BASED, "a base"),
    ):
        if pattern.search(said) and not pattern.search(words(gold)) and not quantity(answer):
            raise Refused(what)
    return _same(gold, answer, leaf)


def _same(gold: str, answer: str, leaf: Leaf) -> bool | None:
    if not answer or not gold:
        return False
    gold_number, answer_number = quantity(gold), quantity(answer)
    if gold_number and answer_number:
        return same_quantity(gold_number, answer_number) is None
    gold, answer = (_listed_words(text) for text in (gold, answer))
    for one, other, flip in ((gold, answer, True), (answer, gold, False)):
        if one[:1].isupper() and one[1:2] == other[:1] == "(" and len(split_list(one[1:]).items) > 1:
            return _same(one[1:], other, leaf) if flip else _same(other, one[1:], leaf)  # P(1,2) is (1,2)
    for rule in (
        _as_time_or_ratio,
        _as_words,
        _as_several,
        _as_spans,
        _as_equation,
        _as_matrix,
        _as_list,
        _as_unit,
    ):
        decided = rule(gold, answer, leaf)
        if decided is not NotImplemented:
            return decided
    return leaf(gold, answer)


def _listed_words(text: str) -> str:
    r"""`1 and 2` as `1;2`, and `\text{B,C}` as two texts."""
    if wrapped := _WRAPPED_LIST.fullmatch(text):
        text = ";".join(rf"\text{{{part.strip()}}}" for part in wrapped[1].split(","))
    text = _BETWEEN.sub(r"\1\2\3\4\5", _BETWEEN_TURNED.sub(_ascending, text))
    return _CONNECTIVE.sub(";", text) if "and" in text or "or" in text else text


def _ascending(match: re.Match[str]) -> str:
    """`x>1 and x<3` as `1<x<3`."""
    return match[3] + match[2].replace(">", "<").replace("g", "l") + match[1] + match[4] + match[5]


def _plain_words(text: str) -> str | None:
    r"""What a text says if it is nothing but words: `\text{Monday}`, "no solution"; None for mathematics."""
    said = words(text).strip(" .'\"()")
    if not re.fullmatch(r"[a-z][a-z' -]*", said):
        return None
    wrapped = TEXT.sub("", text).strip(" ()") == ""
    return said if wrapped or len(said) > 3 or said in ("yes", "no", "odd", "six", "ten") else None


def _as_words(gold: str, answer: str, leaf: Leaf) -> Any:
    choice, chosen = _CHOICE.match(gold), _CHOICE.match(answer)
    if choice and choice[1].isupper():
        if chosen:
            return chosen[1] == choice[1] or (len(answer) > 1 and chosen[1].upper() == choice[1])
        if labelled := _LABELLED.match(answer):
            several = _LABEL.search(labelled[3]) or _CHOICE.match(labelled[3])
            return not several and (labelled[1] or labelled[2]) == choice[1]
    elif not choice and not _LABELLED.match(gold) and (labelled := _LABELLED.match(answer)):
        return _same(gold, labelled[3], leaf)
    elif not choice and (labelled := _LABELLED.match(gold)) and chosen:
        return chosen[1].upper() == (labelled[1] or labelled[2])
    text = words(gold)
    if text == words(answer) and len(text) > 1 and text.isalpha() and r"\text" in gold + answer:
        return True
    said, heard = _plain_words(gold), _plain_words(answer)
    empty = [text == r"\emptyset" or bool(_NOTHING.fullmatch(words(text))) for text in (gold, answer)]
    if any(empty):
        return all(empty)
    endless = [text == r"\infty" or bool(_ENDLESS.fullmatch(words(text))) for text in (gold, answer)]
    if all(endless) and gold != answer:
        return True
    if said is not None and heard is not None:
        article = re.compile(r"^(?:the|an?) ")
        return article.sub("", said).replace("-", " ") == article.sub("", heard).replace("-", " ")
    for one, other, flip in ((said, answer, False), (heard, gold, True)):
        number = spoken.number(one) if one else None
        if number is not None:
            digits = rf"\frac{{{number.numerator}}}{{{number.denominator}}}"
            return _same(other, digits, leaf) if flip else _same(digits, other, leaf)
        if one is not None and not _EVERYTHING.fullmatch(one):
            return False
    return NotImplemented


def _as_time_or_ratio(gold: str, answer: str, leaf: Leaf) -> Any:
    said = [words(text).strip(" .()") for text in (gold, answer)]
    days = [spoken.date(text) for text in said]
    if any(days):
        (day, year), (day2, year2) = ((d[:2], d[2]) if d else (None, None) for d in days)
        return day == day2 and year in (None, year2)
    times = [spoken.time(text) for text in said]
    if any(one and one[2] for one in times):
        return bool(times[0] and times[1] and spoken.same_time(times[0], times[1]))
    ratios = [_RATIO.fullmatch(text) for text in (gold, answer)]
    if not any(ratios):
        return NotImplemented
    mine, theirs = ([int(n) for n in re.findall(r"\d+", m[0])] if m else [] for m in ratios)
    if mine and theirs:
        timely = all(len(n) == 2 for m in ratios if m for n in re.findall(r":(\d+)$", m[0]))
        if timely or len(mine) != len(theirs) or 0 in mine + theirs:
            return mine == theirs
        return all(a * theirs[0] == b * mine[0] for a, b in zip(mine, theirs, strict=True))
    numbers, other = (mine, answer) if mine else (theirs, gold)
    value = quantity(other)
    if len(numbers) != 2 or not numbers[1] or value is None or value.unit or value.percent:
        return False
    return value.places is None and (value.value.numerator, value.value.denominator) == tuple(numbers)


def _as_several(gold: str, answer: str, leaf: Leaf) -> Any:
    r"""`2 \pm \sqrt 3` is two numbers."""
    if not (_PM.search(gold) or _PM.search(answer)):
        return NotImplemented
    if _PM.search(gold) and _PM.search(answer) and gold == answer:
        return True
    return _as_list(_expanded(gold), _expanded(answer), leaf)


def _expanded(text: str) -> str:
    items = []
    for item in split_list(text).items:
        name, value = ("", item) if len(sides(item)) != 2 else sides(item)
        if not name or is_name(name):
            item = value
        for plus, minus in (("+", "-"), ("-", "+")) if _PM.search(item) else (("", ""),):
            replaced = _PM.sub(lambda m, p=plus, n=minus: p if m[1] == "pm" else n, item)  # type: ignore[misc]
            items.append(replaced.removeprefix("+"))
    return ";".join(items)


# ---- intervals ----


def spans_of(text: str) -> list[Span] | None:
    """The intervals that a text names, by brackets or by inequalities; None if it does not."""
    if builder := _SET_BUILDER.match(text):
        text = builder[2]
    if _EVERYTHING.fullmatch(words(text)):
        text = r"(-\infty,\infty)"
    text = _MEMBER.sub("", text)
    found: list[Span] = []
    for _, part in split_top(text, (r"\cup", r"\vee", r"\lor")):
        listed = split_list(part)
        if listed.brackets in ("()", "[]", "(]", "[)") and len(listed.items) == 2:
            low, high = listed.items
            found.append(Span(low, high, listed.brackets[0] == "(", listed.brackets[1] == ")"))
            continue
        for item in listed.items if not listed.brackets else (part,):
            inner = _inequality(item)
            if inner is None:
                return None
            found += inner
    return found


def _inequality(text: str) -> list[Span] | None:
    parts = split_top(text, ("<", ">", r"\leq", r"\geq", r"\neq"))
    if len(parts) == 2 and (size := _SIZE_OF.fullmatch(parts[0][1])) and parts[1][0] != r"\neq":
        mark, end = parts[1]
        strict, name = mark in "<>", size[1]
        if mark in ("<", r"\leq"):
            return [Span(f"-({end})", end, strict, strict, name)]
        low, high = r"-\infty", r"\infty"
        return [Span(low, f"-({end})", True, strict, name), Span(end, high, strict, True, name)]
    if len(parts) == 2 and parts[1][0] == r"\neq" and re.fullmatch("[a-z]", parts[0][1]):
        name, point = parts[0][1], parts[1][1]
        return [Span(r"-\infty", point, True, True, name), Span(point, r"\infty", True, True, name)]
    if len(parts) not in (2, 3) or any(mark == r"\neq" for mark, _ in parts):
        return None
    if parts[1][0] in (">", r"\geq"):  # turned round, so that it ascends
        flip = {">": "<", r"\geq": r"\leq", "<": ">", r"\leq": r"\geq", "": ""}
        marks = [flip[mark] for mark, _ in parts[1:]][::-1]
        parts = list(zip(["", *marks], [part for _, part in parts][::-1], strict=True))
    if any(mark in (">", r"\geq") for mark, _ in parts):
        return None
    places = [
        i for i, (_, part) in enumerate(parts) if re.fullmatch(r"[A-Za-z]|\\[a-z]+(?<!pi)(?<!infty)", part)
    ]
    if len(places) != 1:
        return None
    at = places[0]
    low = parts[at - 1][1] if at > 0 else r"-\infty"
    high = parts[at + 1][1] if at + 1 < len(parts) else r"\infty"
    if len(parts) == 3 and at != 1:
        return None
    low_open = at == 0 or parts[at][0] == "<"
    high_open = at + 1 == len(parts) or parts[at + 1][0] == "<"
    return [Span(low, high, low_open, high_open, parts[at][1])]


def _as_spans(gold: str, answer: str, leaf: Leaf) -> Any:
    marked = [
        bool(re.search(r"\\cup|[<>]|\\leq|\\geq|\\neq|\\infty|\\mid|\\in(?![a-z])", t))
        for t in (gold, answer)
    ]
    if not any(marked) and not any(split_list(t).brackets in ("[)", "(]") for t in (gold, answer)):
        everything = [bool(_EVERYTHING.fullmatch(words(t))) for t in (gold, answer)]
        return False if any(everything) else NotImplemented
    if gold in (r"\infty", r"-\infty") or answer.removeprefix("+") in (r"\infty", r"-\infty"):
        return gold == answer.removeprefix("+")
    mine, theirs = spans_of(gold), spans_of(answer)
    if None in (mine, theirs) and bool(_MEMBER.match(answer)) != bool(_MEMBER.match(gold)):
        return _same(_MEMBER.sub("", gold), _MEMBER.sub("", answer), leaf)
    if mine is None and theirs is None:
        return _as_inequality(gold, answer, leaf)
    if mine is None or theirs is None:
        return (
            False
            if re.search(r"\\(?:setminus|cap|mathbb)|\\backslash", gold + answer) is None
            else leaf(gold, answer)
        )
    names = {span.variable for span in (*mine, *theirs)} - {""}
    if len(mine) != len(theirs) or len(names) > 1:
        return False

    def same(one: Span, other: Span) -> bool | None:
        if (one.low_open, one.high_open) != (other.low_open, other.high_open):
            return False
        pairs = ((one.low, other.low), (one.high, other.high))
        return all_of([_same(g.removeprefix("+"), a.removeprefix("+"), leaf) for g, a in pairs])

    return _matched(mine, theirs, same)


def _as_inequality(gold: str, answer: str, leaf: Leaf) -> bool | None:
    r"""`2x + y < 3` and the like: two sides and the same relation, either way round."""
    turned = []
    for text in (gold, answer):
        parts = split_top(text, tuple(_RELATIONS))
        if len(parts) != 2:
            return gold == answer
        (_, low), (mark, high) = parts
        turned.append(
            (_RELATIONS[mark].replace(">", "<"), *((low, high) if "<" in _RELATIONS[mark] else (high, low)))
        )
    (mark, low, high), (mark2, low2, high2) = turned
    return mark == mark2 and all_of([_same(low, low2, leaf), _same(high, high2, leaf)])


def _matched(mine: Sequence[T], theirs: Sequence[T], same: Callable[[T, T], bool | None]) -> bool | None:
    left, unknown = list(theirs), False
    for one in mine:
        found = [same(one, other) for other in left]
        if True in found:
            left.pop(found.index(True))
        elif None in found:
            unknown = True
        else:
            return False
    return None if unknown else True


# ---- equations ----


def is_name(text: str) -> bool:
    """Whether a left side only names what the right side is: `x`, `f(2)`, `AB`, `m+n`."""
    if re.fullmatch(r"\([a-z](?:[,;][a-z])+\)", text):  # (x,y) = (1,2)
        return True
    if re.fullmatch(r"\|[a-y]\|", text):  # |x| = 7 is two numbers; |z| is a size
        return False
    return bool(_NAMES.fullmatch(text)) or (text.isalpha() and text.isupper() and len(text) <= 4)


def _as_equation(gold: str, answer: str, leaf: Leaf) -> Any:
    if "=" not in gold and "=" not in answer:
        return NotImplemented
    if len(split_top(gold, (",", ";"))) > 1 or len(split_top(answer, (",", ";"))) > 1:
        return _as_list(gold, answer, leaf)
    mine, theirs = _turned(sides(gold)), _turned(sides(answer))
    if len(mine) == len(theirs) == 2:
        if mine[0] == theirs[0]:
            return _same(mine[1], theirs[1], leaf)
        if is_name(mine[0]) and is_name(theirs[0]) and (quantity(mine[1]) or quantity(theirs[1])):
            return False
        return leaf(gold, answer)
    if len(mine) == 2 and len(theirs) == 1:
        return _same(mine[1], answer, leaf) if is_name(mine[0]) else False
    if len(mine) == 1 and len(theirs) == 2:
        if is_name(theirs[0]):
            return _same(gold, theirs[1], leaf)
        if re.search("[A-Za-z]", re.sub(r"\\[a-zA-Z]+", "", TEXT.sub("", theirs[0]))):
            return False
        return all_of([_same(gold, side, leaf) for side in theirs])
    return NotImplemented if len(mine) == len(theirs) == 1 else leaf(gold, answer)


def _turned(found: list[str]) -> list[str]:
    """`5 = x` as `x = 5`."""
    return found[::-1] if len(found) == 2 and is_name(found[1]) and not is_name(found[0]) else found


# ---- matrices, lists, units ----


def cells(text: str) -> tuple[str, list[list[str]]] | None:
    """What a matrix is (v: a determinant) and its rows; None if the text is none."""
    if text.startswith("[["):
        outer = split_list(text)
        inner = [split_list(row) for row in outer.items]
        if outer.brackets == "[]" and all(row.brackets == "[]" for row in inner):
            return "m", [list(row.items) for row in inner]
    match = _MATRIX.match(text)
    if match is None or r"\begin" in match[2]:
        return None
    rows = [[cell.strip() for cell in row.split("&")] for row in match[2].strip().split(r"\\") if row.strip()]
    if match[3]:
        rows = [list(column) for column in zip(*rows, strict=False)]
    return ("v" if match[1][0] in "vV" else "m"), rows


def _as_matrix(gold: str, answer: str, leaf: Leaf) -> Any:
    mine, theirs = cells(gold), cells(answer)
    if mine is None and theirs is None:
        return NotImplemented
    for one, other, flip in ((mine, answer, False), (theirs, gold, True)):
        if one is not None and (theirs if not flip else mine) is None:
            listed = split_list(other)
            if listed.brackets not in ("()", "[]") or 1 not in (len(one[1]), len(one[1][0])):
                return leaf(gold, answer)
            flat = [cell for row in one[1] for cell in row]
            pairs = zip(*((flat, listed.items) if not flip else (listed.items, flat)), strict=False)
            return len(flat) == len(listed.items) and all_of([_same(g, a, leaf) for g, a in pairs])
    assert mine is not None and theirs is not None
    if mine[0] != theirs[0] or [len(row) for row in mine[1]] != [len(row) for row in theirs[1]]:
        return False
    return all_of(
        [
            _same(g, a, leaf)
            for x, y in zip(mine[1], theirs[1], strict=True)
            for g, a in zip(x, y, strict=True)
        ]
    )


def _as_list(gold: str, answer: str, leaf: Leaf) -> Any:
    g, a = (Listed("", (text,)) if quantity(text) else split_list(text) for text in (gold, answer))
    if len(g.items) == 1 and len(a.items) == 1:
        if (g.brackets == "{}") == (a.brackets == "{}") and not {g.brackets, a.brackets} & {"{}", "[]", "()"}:
            return NotImplemented
        if "{}" in (g.brackets, a.brackets) and {g.brackets, a.brackets} <= {"{}", ""}:
            return _same(g.items[0], a.items[0], leaf)
        return NotImplemented
    if len(g.items) > 1 and len(a.items) == 1 and quantity(answer) and "," in answer:
        a = Listed("", tuple(answer.split(",")))  # 100,200 for the gold 100, 200
    both = len(g.items) > 1 and len(a.items) > 1
    if both and g.brackets != a.brackets and (g.brackets == "[]" or (g.brackets and a.brackets)):
        return False
    named = [[_named(item) for item in side.items] for side in (g, a)]
    if len(g.items) != len(a.items):
        distinct = [_distinct([value for _, value in side], leaf) for side in named]
        repeated = len(distinct[0]) < len(g.items)
        if not {g.brackets, a.brackets} <= {"", "{}"} or repeated or len(distinct[0]) != len(distinct[1]):
            return False
        named = [[("", value) for value in side] for side in distinct]
    names = [[name for name, _ in side] for side in named]
    ordered = g.brackets not in ("", "{}") or (len(set(names[0])) > 1 and not any(names[1]))
    if ordered:
        values = zip(named[0], named[1], strict=True)
        return all_of([_same(x, y, leaf) for (_, x), (_, y) in values])

    def same(one: tuple[str, str], other: tuple[str, str]) -> bool | None:
        names_differ = one[0] and other[0] and one[0] != other[0]
        return False if names_differ else _same(one[1], other[1], leaf)

    return _matched(named[0], named[1], same)


def _named(item: str) -> tuple[str, str]:
    found = _turned(sides(item))
    return (found[0], found[1]) if len(found) == 2 and is_name(found[0]) else ("", item)


def _distinct(values: Sequence[str], leaf: Leaf) -> list[str]:
    kept: list[str] = []
    for value in values:
        if not any(value == other or _same(other, value, leaf) for other in kept):
            kept.append(value)
    return kept


def _as_unit(gold: str, answer: str, leaf: Leaf) -> Any:
    r"""`8\sqrt{2} \text{ cm}`: the unit is compared apart from the number."""
    parts = []
    for text in (gold, answer):
        match = _TRAILING_UNIT.match(text)
        unit = unit_of(match[2]) if match else None
        parts.append((match[1], unit) if match and unit is not None else (text, ""))
    (number, unit), (number2, unit2) = parts
    if _ANGLE_OF.search(gold) or _ANGLE_OF.search(answer):
        return NotImplemented
    bare = [re.sub(r"\^\\circ$", "", text) for text in (number, number2)]
    if not unit and not unit2 and bare == [number, number2]:
        return NotImplemented
    if unit_ratio(unit, unit2) != 1 or has_scale(unit) != has_scale(unit2):
        return False
    return _same(bare[0], bare[1], leaf)
