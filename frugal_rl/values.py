"""What a key of a recipe accepts, by its type hint: from TOML's values to Python's and back.

`Literal`: these words; `Annotated[..., Range]`: within these limits; `Mapping`: a table; `tuple`: a list; a
union: the first that fits. An integer fits where a float is expected; a boolean is never a number;
infinities and NaN fit nowhere.
"""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from frugal_rl.errors import InputError


@dataclass(frozen=True)
class Range:
    """Limits of a number's value, or of a text's length in characters."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def holds(self, size: float) -> bool:
        return (
            (self.at_least is None or size >= self.at_least)
            and (self.above is None or size > self.above)
            and (self.at_most is None or size <= self.at_most)
            and (self.below is None or size < self.below)
        )

    def __str__(self) -> str:
        limits = {
            "at least": self.at_least,
            "above": self.above,
            "at most": self.at_most,
            "below": self.below,
        }
        return " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)


def fit(value: Any, hint: Any) -> Any:
    """`value` as a field of this hint holds it. Raises: ValueError where it does not fit."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return fit(value, option)
            except ValueError:  # perhaps the next option fits
                continue
    elif origin is Annotated:
        fitted = fit(value, arguments[0])
        if arguments[1].holds(len(fitted) if isinstance(fitted, str) else fitted):
            return fitted
    elif origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif origin is tuple:
        if isinstance(value, list) and value:
            return tuple(fit(item, arguments[0]) for item in value)
    elif origin is Mapping:
        if isinstance(value, dict) and value:
            return {fit(key, arguments[0]): fit(item, arguments[1]) for key, item in value.items()}
    elif hint is float and type(value) in (int, float) and abs(value) < math.inf:
        try:
            return float(value)
        except OverflowError as error:  # an integer beyond any float
            raise ValueError(value) from error
    elif type(value) is hint and hint is not float:  # by identity: True is no int
        return value
    raise ValueError(value)


def expected(hint: Any) -> str:
    """What a key accepts, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(expected(option) for option in arguments if option is not types.NoneType)
    if origin is Annotated:
        base, limits = arguments
        return "a text that is not empty" if base is str else f"{expected(base)} {limits}"
    if origin is tuple:
        return f"a list of such, each {expected(arguments[0])}"
    if origin is Mapping:
        return f"a table of such as {{name = value}}, each value {expected(arguments[1])}"
    if origin is Literal:
        options = ", ".join(json.dumps(word) for word in arguments)
        return f"one of {options}"
    plain = {str: "a text", int: "an integer", float: "a finite number", bool: "true or false"}
    return plain[hint]


def words(hint: Any) -> Sequence[str]:
    if get_origin(hint) in (Union, types.UnionType):
        return [word for option in get_args(hint) for word in words(option)]
    return get_args(hint) if get_origin(hint) is Literal else ()


def toml_value(value: str | float | tuple[str, ...] | Mapping[str, Any]) -> str:
    """A value of a recipe as TOML: so `f"model.name={toml_value(name)}"` is a safe override."""
    if isinstance(value, tuple):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{toml_value(key)} = {toml_value(item)}' for key, item in value.items())} }}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON's escapes are TOML's, but that TOML wants DEL escaped as well.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def show(value: Any) -> str:
    """A value as it stands in TOML, as far as that is short."""
    if isinstance(value, bool):
        return str(value).lower()
    shown = toml_value(value) if isinstance(value, str | int | float) else repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def parse_bytes(text: str) -> int:
    """ "24GiB", "1.5 GiB" or "512MiB" as bytes. Raises: InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text, re.ASCII)
    unit = match[2] if match else ""
    if match is None or unit not in ("GiB", "MiB"):
        hint = (
            f"; write {unit[0]}iB, which is 2**{30 if unit == 'GB' else 20} bytes"
            if unit in ("GB", "MB")
            else ""
        )
        raise InputError(f"{show(text)} is not a size: expected such as 24GiB or 512MiB{hint}")
    size_bytes = int(float(match[1]) * (2**30 if unit == "GiB" else 2**20))
    if size_bytes == 0:
        raise InputError(f"{show(text)} is no memory at all: expected such as 24GiB or 512MiB")
    return size_bytes
