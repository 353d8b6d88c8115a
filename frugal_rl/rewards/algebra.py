r"""Whether two expressions are equal, by algebra: runs in a worker, where it may hang and be killed.

Law: expressions are read by math-verify's parser. Two are equal if their values agree to 300 digits at
fixed points (Schwartz-Zippel: expressions that are no identity agree almost nowhere), decimals taken as
exact fractions; equations if their sides' differences are in one ratio at all points. What cannot be
evaluated (functions without a definition, derivatives, sets) is asked of math-verify's `verify`.

- Points where the gold is real decide; where only one of them is real elsewhere, they are compared on
  positive points alone: \sqrt{x^3} is x\sqrt{x}, and |x| is not x. Of a gold with |x| and an answer without,
  all points decide: \ln x is not \ln|x|.
- Running out of memory or stack is not "unequal": math-verify's `except Exception` would make it so,
  therefore what it calls raises `Exhausted` there, a BaseException.

Source: math-verify 0.9 (huggingface/Math-Verify, `grader.py`), gold first, both wrapped as `$...$`.
Differs: its SIGALRM timeouts are off, since it turns them into "not equal"; the pool kills instead. Its
rounding to 6 digits, which calls e^{-20} and e^{-21} equal, is not used where values can be compared.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from typing import Any, Final

from frugal_rl.rewards.structure import Refused, compare, sides

DIGITS: Final = 320
AGREE: Final = 300  # digits: a text of 300 characters can name a tiny difference
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\^\\circ")
_SLASH = re.compile(r"(?<![\w}])(\d+)/(\d+)(?=[A-Za-z\\(])")
_LETTERS = re.compile(r"(?:\\(?:angle|triangle|overline|widehat)(?:\{| )?)?[A-Z]{2,}\}?")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_CONSTANT = re.compile(r"(?<=\+)C$|^C(?=\+)")  # of integration


class Exhausted(BaseException):
    """Out of memory or stack, on its way past `except Exception`."""


def sympy_equal(payload: dict[str, Any]) -> dict[str, str]:
    """Whether the answer is the gold. Raises MemoryError or RecursionError if it took too much."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
    _guard()
    try:
        same = compare(payload["gold"], payload["answer"], _leaf if payload["identical"] else _understood)
    except Refused as error:
        return {"verdict": "WRONG", "detail": str(error)}
    except Exhausted as error:
        raise MemoryError(str(error)) from error
    if same is None:
        return {"verdict": "WRONG", "detail": "not an expression, and other words"}
    return {"verdict": "CORRECT" if same else "WRONG", "detail": ""}


@functools.cache
def _guard() -> None:
    """Wrap what math-verify calls inside `except Exception`, once a process."""
    import sympy
    from math_verify import grader, parser

    for owner, name in (
        (grader, "simplify"),
        (grader, "solve"),
        (grader, "safe_sympy_doit"),
        (parser, "latex2sympy"),
        (sympy.core.evalf.EvalfMixin, "evalf"),
        (sympy.Basic, "as_set"),
        (sympy.Expr, "round"),
        (sympy.Expr, "__sub__"),
        (sympy.Set, "symmetric_difference"),
    ):
        if hasattr(owner, name):
            setattr(owner, name, _guarded(getattr(owner, name)))


_inside = [0]  # calls of guarded functions that are open: sympy may handle what it raises itself


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(*arguments: Any, **named: Any) -> Any:
        _inside[0] += 1
        try:
            return function(*arguments, **named)
        except (MemoryError, RecursionError) as error:
            if _inside[0] > 1:
                raise
            raise Exhausted(f"{type(error).__name__}: {error}") from error
        finally:
            _inside[0] -= 1

    return guarded


@functools.lru_cache(maxsize=64)
def read(text: str) -> Any:
    """The sympy object of a normalised text, decimals as exact fractions; None if it is none."""
    import sympy
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    text = _CONSTANT.sub("c", _THOUSANDS.sub("", text).replace(";", ","))
    if _TRIGONOMETRIC.search(text):
        text = _DEGREES.sub(r"(\1\\cdot\\frac{\\pi}{180})", text)
    text = _SLASH.sub(r"\\frac{\1}{\2}", text)
    normal = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True)
    try:
        found = latex2sympy(
            normalize_latex(text, normal),
            is_real=None,
            convert_degrees=False,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except (MemoryError, RecursionError):
        raise
    except Exception:  # noqa: BLE001 - the parser raises bare Exception for what it cannot read
        return None
    if isinstance(found, sympy.Expr):
        floats = {number: sympy.Rational(str(number)) for number in found.atoms(sympy.Float)}
        found = found.xreplace(floats).subs(sympy.Symbol("i"), sympy.I)
    return found


def _leaf(gold: str, answer: str) -> bool | None:
    return gold == answer or _understood(gold, answer)


def _understood(gold: str, answer: str) -> bool | None:
    import sympy

    mine, theirs = sides(gold), sides(answer)
    if len(mine) == len(theirs) == 2:
        left = [read(side) for side in (*mine, *theirs)]
        if all(isinstance(one, sympy.Expr) for one in left):
            decided = _in_ratio(left[0] - left[1], left[2] - left[3])
            return decided if decided is not None else _asked(gold, answer)
    if _LETTERS.fullmatch(gold) and _LETTERS.fullmatch(answer):  # HTH is no product
        return gold == answer
    if gold.count("'") != answer.count("'"):  # the parser drops them
        return None
    g, a = read(gold), read(answer)
    if g is None or a is None:
        return None
    if isinstance(g, sympy.Expr) and isinstance(a, sympy.Expr):
        decided = _agree(g, a)
        if decided is not None:
            return decided
    return _asked(gold, answer)


def _points(symbols: Any) -> list[dict[Any, Any]]:
    """Three positive points and two negative ones, the same for everyone."""
    import sympy

    ordered = sorted(symbols, key=str)
    names = [str(symbol) for symbol in ordered]
    return [
        {
            symbol: sympy.Rational(sign * (1009 + 613 * place * (turn + 1) + 271 * turn), 907 + 97 * turn)
            for place, (symbol, _) in enumerate(zip(ordered, names, strict=True), 1)
        }
        for turn, sign in enumerate((1, 1, 1, -1, -1))
    ]


def _value(expression: Any, point: dict[Any, Any]) -> Any:
    """Its value to DIGITS digits, or None if it has none."""
    value = expression.subs(point).doit().evalf(DIGITS)
    return value if value.is_number and value.is_finite and value.is_comparable is not None else None


def _near(one: Any, other: Any) -> bool:
    size = max(abs(one), abs(other))
    return bool(size == 0 or abs(one - other) <= size / 10**AGREE)


def _agree(gold: Any, answer: Any) -> bool | None:
    import sympy

    symbols = gold.free_symbols | answer.free_symbols
    if not symbols:
        gold, answer = gold.doit(), answer.doit()
        if gold.is_Rational and answer.is_Rational:
            return bool(gold == answer)
        values = [_value(one, {}) for one in (gold, answer)]
        if None in values:
            return None
        if 0 in values:  # it has no digits to compare
            return bool((gold - answer).equals(0))
        return _near(values[0], values[1])
    compared = 0
    without_size = gold.has(sympy.Abs) and not answer.has(sympy.Abs)
    for place, point in enumerate(_points(symbols)):
        g, a = _value(gold, point), _value(answer, point)
        if g is None and a is None:
            continue
        if place >= 3 and any(v is None or not v.is_real for v in (g, a)):
            if without_size and g is not None and g.is_real:  # \\ln x is not \\ln|x|
                return False
            continue
        if g is None or a is None or not _near(g, a):
            return False
        compared += 1
    return True if compared else None


def _in_ratio(gold: Any, answer: Any) -> bool | None:
    """Whether two expressions are the same but for a factor: they are 0 in the same places."""
    symbols = gold.free_symbols | answer.free_symbols
    if not symbols or gold.free_symbols != answer.free_symbols:
        return False
    ratios = []
    for point in _points(symbols):
        g, a = _value(gold, point), _value(answer, point)
        if g is None or a is None or g == 0:
            continue
        ratios.append(a / g)
    if len(ratios) < 2:
        return None
    return bool(ratios[0] != 0 and all(_near(ratios[0], ratio) for ratio in ratios[1:]))


def _asked(gold: str, answer: str) -> bool:
    """math-verify's own verdict."""
    from math_verify import LatexExtractionConfig, parse, verify

    def parsed(text: str) -> list[Any]:
        return list(parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None))

    g, a = parsed(gold), parsed(answer)
    if not any(not isinstance(one, str) for one in a):
        return False
    try:
        return bool(verify(g, a, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True))
    except (MemoryError, RecursionError):
        raise
    except Exception:
        if not verify(g, g, timeout_seconds=None, raise_on_error=True):
            raise
        return False
