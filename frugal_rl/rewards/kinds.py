"""What `reward.kind` says: one reward, or a weighted sum of several.

    math
    math + 0.2 * format(<think>.*</think>.*)
    rewards.py:judge

A part is a built-in reward, `path.py:function`, or the name of an entry point in the group
`frugal_rl.rewards`. Arguments stand in brackets, as text; the last one may hold commas and brackets.
The first part gives the verdict, all parts the reward.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from frugal_rl.errors import InputError

ENTRY_POINTS: Final = "frugal_rl.rewards"


@dataclass(frozen=True)
class Form:
    """A built-in reward: how many arguments it takes, and what runs in a worker, if it does."""

    fewest: int = 0
    most: int = 0
    function: str | None = None


BUILT_IN: Final[dict[str, Form]] = {
    "math": Form(),
    "exact": Form(),
    "numeric": Form(most=1),  # the tolerance, relative
    "last": Form(),
    "choice": Form(),
    "tags": Form(fewest=1, most=20),  # names of tags, in order
    "overlong": Form(fewest=2, most=2),  # characters without loss, characters at -1
    "format": Form(fewest=1, most=1, function="frugal_rl.rewards.verifiers:regular_expression"),
    "code": Form(most=1, function="frugal_rl.rewards.verifiers:code"),  # seconds for one program
    "countdown": Form(function="frugal_rl.rewards.verifiers:countdown"),
    "gym": Form(function="frugal_rl.rewards.gym:score"),  # of data.source = "gym:NAME"
}
_TERM = re.compile(r"(?:([0-9.]+)\s*\*\s*)?([^()*\s][^()]*?)\s*(?:\((.*)\))?", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """`function` is "path.py:name" or "module:name" where a worker has to run it."""

    weight: float
    name: str
    arguments: tuple[str, ...] = ()
    function: str | None = None


def read_kind(text: str) -> tuple[Part, ...]:
    """The parts of a `reward.kind`. Raises: InputError, which says what is not understood."""
    parts = tuple(_part(term) for term in _terms(text))
    names = [part.name for part in parts]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"reward {text!r} has {name!r} twice: each part is logged by its name")
    return parts


def _terms(text: str) -> list[str]:
    """Split at ` + ` outside brackets."""
    terms, depth = [""], 0
    for piece in re.findall(r"[()]|\s\+\s|.", text, re.DOTALL):
        depth += (piece == "(") - (piece == ")")
        if depth <= 0 and piece.strip() == "+" and len(piece) == 3:
            terms.append("")
        else:
            terms[-1] += piece
    return [term.strip() for term in terms]


def _part(term: str) -> Part:
    match = _TERM.fullmatch(term)
    if match is None:
        raise InputError(f"reward {term!r} is not understood: write NAME, or WEIGHT * NAME(ARGUMENTS)")
    try:
        weight = float(match[1]) if match[1] else 1.0
    except ValueError as error:
        raise InputError(f"reward {term!r}: {match[1]!r} is not a weight") from error
    if not math.isfinite(weight) or weight <= 0:
        raise InputError(f"reward {term!r}: a weight is above 0")
    name = match[2].strip()
    form = BUILT_IN.get(name)
    if form is None:
        if match[3] is not None:
            raise InputError(f"reward {term!r}: only built-in rewards take arguments")
        return Part(weight, name, function=_function(name))
    given = [] if match[3] is None else [a.strip() for a in match[3].split(",", max(0, form.most - 1))]
    if not form.fewest <= len(given) <= form.most:
        wanted = str(form.fewest) if form.fewest == form.most else f"{form.fewest} to {form.most}"
        raise InputError(f"reward {term!r}: {name} takes {wanted} arguments, got {len(given)}")
    return Part(weight, name, tuple(given), form.function)


def _function(name: str) -> str:
    """Where a reward that is not built in is found."""
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py"):
        if not Path(path).is_file():
            raise InputError(f"reward {name!r}: there is no file {path}")
        if not function.isidentifier():
            raise InputError(f"reward {name!r}: {function!r} is not the name of a function")
        return f"{Path(path).resolve()}:{function}"
    from importlib.metadata import entry_points

    found = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    if name in found:
        return found[name]
    known = [*BUILT_IN, *found]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(
        f"unknown reward {name!r}, expected one of {', '.join(known)}, or path.py:function{hint}"
    )
