"""What an update did to the weights: how many entries, where, how far, in how many directions, how often.

Definitions. An entry is changed *in any bit*, or *moved*: |after - before| > 1e-5, the papers' rule, in
float64 of the stored values. ULPs are counted on the line of all numbers of a format (-0 and +0 are one
place). Of a matrix [O, I], `rows` are output rows and `columns` input columns; Gini is that of the changed
entries a row (column) holds, `top` their share in its fullest 1 %. Of two sets of entries in the same n:
Jaccard is common / (a + b - common), o1 and o2 are common / a and common / b.

Chance: as many changed entries in each tensor, placed at random. So common is sum of a_t b_t / n_t over the
tensors t, and a row's entries are binomial (mean of DRAWS draws of a fixed seed).

Source: update sparsity and its tolerance, o1, o2 and their baseline, arXiv 2505.11711; rank, spectrum.py;
that rounding hides small updates, so that both rules are needed, arXiv 2509.04259 and 2511.08567.
Differs: the baselines there take one density for the whole model, which makes any two updates that prefer
the same tensors look alike; here it is each tensor's own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .checkpoint import Checkpoint
from .errors import InputError
from .patch import Patch, TensorPatch
from .spectrum import Rank, effective_rank

MOVED = 1e-5  # the papers' threshold (arXiv 2505.11711, 2602.07729)
TOP = 0.01  # of the rows or columns
DRAWS = 16
ULP_LIMITS = (0, 1, 2, 3, 5, 9, 17, 65, 257, 1025)  # the first ULPs of each class
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)$")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Counts:
    """Entries there are, and how many of them changed by each rule."""

    entries: int = 0
    changed_any: int = 0
    changed_1e5: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.entries + other.entries,
            self.changed_any + other.changed_any,
            self.changed_1e5 + other.changed_1e5,
        )


@dataclass(frozen=True)
class Spread:
    """How unevenly changed entries lie over rows or columns, and how unevenly chance would place them."""

    gini: float
    gini_chance: float
    top: float
    top_chance: float


@dataclass(frozen=True)
class TensorUpdate:
    """One tensor's change. `layer` is None outside the layers; what is None does not apply or was not asked.

    `ulps`: entries by class of ULP_LIMITS.
    """

    name: str
    layer: int | None
    kind: str
    dtype: str
    shape: tuple[int, ...]
    counts: Counts
    ulps: tuple[int, ...]
    rank: Rank | None = None
    rows: Spread | None = None
    columns: Spread | None = None


@dataclass(frozen=True)
class Update:
    """All tensors of a base, changed or not, in the order of their names."""

    tensors: tuple[TensorUpdate, ...]

    @property
    def total(self) -> Counts:
        return sum((t.counts for t in self.tensors), Counts())

    @property
    def ulps(self) -> list[int]:
        return [sum(of_class) for of_class in zip(*(t.ulps for t in self.tensors), strict=True)]

    def by(self, key: Callable[[TensorUpdate], Any]) -> dict[Any, list[TensorUpdate]]:
        """Tensors with the same kind or layer, in the order of their first."""
        groups: dict[Any, list[TensorUpdate]] = {}
        for tensor in self.tensors:
            groups.setdefault(key(tensor), []).append(tensor)
        return groups


def place_of(name: str) -> tuple[int | None, str]:
    """A tensor's layer and kind: `model.layers.3.mlp.up_proj.weight` is 3, `up_proj`."""
    match = LAYER.search(name)
    layer, rest = (int(match[1]), match[2]) if match else (None, name)
    parts = rest.removesuffix(".weight").split(".")
    return layer, ".".join(parts[-2:]) if parts[-1] == "bias" else parts[-1]


def values_of(bits_N: Array, dtype: str) -> Array:
    """What bits stand for, in float64. Raises InputError for a format without a meaning here."""
    if dtype == "BF16":
        with np.errstate(invalid="ignore"):  # a signalling NaN is a NaN
            return (bits_N.astype("<u4") << 16).view("<f4").astype(np.float64)
    if dtype in ("F16", "F32", "F64"):
        return bits_N.view(f"<f{bits_N.itemsize}").astype(np.float64)
    raise InputError(f"entries are {dtype}; what changed is analysed in BF16, F16, F32 and F64")


def ulps_between(before_N: Array, after_N: Array) -> Array:
    """How many numbers of the format lie between, plus one; 0 for the two zeros. Bits in, float64 out."""

    def place(bits_N: Array) -> Array:
        width = 8 * bits_N.itemsize
        size = (bits_N & bits_N.dtype.type(2 ** (width - 1) - 1)).astype(np.float64)
        return np.where(bits_N >> (width - 1) > 0, -size, size)

    return np.abs(place(after_N) - place(before_N))


def analyse(
    base: Checkpoint, patch: Patch, *, ranks: bool = True, leave_out: frozenset[str] = frozenset()
) -> Update:
    """`leave_out`: tensors that are copies of others. Raises WrongBase, InputError."""
    patch.state_of(lambda name: base.touched_bits(name, patch.tensors[name]), str(base.folder))
    return Update(
        tuple(
            _tensor_update(name, base, patch.tensors.get(name), ranks)
            for name in base.tensors
            if name not in leave_out
        )
    )


def _tensor_update(name: str, base: Checkpoint, change: TensorPatch | None, ranks: bool) -> TensorUpdate:
    info, (layer, kind) = base.tensors[name], place_of(name)
    entries = math.prod(info.shape)
    if change is None:
        none = (0,) * len(ULP_LIMITS)
        return TensorUpdate(name, layer, kind, info.dtype, info.shape, Counts(entries), none)
    before = _before(base, name, change)
    after = change.applied(before)
    with np.errstate(invalid="ignore"):  # from one infinity to another
        difference = values_of(after, info.dtype) - values_of(before, info.dtype)
    finite = np.isfinite(difference)
    classes = np.searchsorted(ULP_LIMITS, ulps_between(before, after), side="right") - 1
    rank = rows = columns = None
    if len(info.shape) == 2 and min(info.shape) > 1:
        row_N, column_N = np.divmod(change.positions, info.shape[1])
        rows, columns = (
            spread(np.bincount(place, minlength=size), entries // size)
            for place, size in ((row_N, info.shape[0]), (column_N, info.shape[1]))
        )
        if ranks and finite.all() and difference.any():
            rank = effective_rank(row_N, column_N, difference, (info.shape[0], info.shape[1]))
    return TensorUpdate(
        name,
        layer,
        kind,
        info.dtype,
        info.shape,
        Counts(entries, len(change), int((np.abs(difference) > MOVED).sum())),
        tuple(np.bincount(classes, minlength=len(ULP_LIMITS)).tolist()),
        rank,
        rows,
        columns,
    )


# --- concentration


def gini(count_X: Array) -> float:
    """0: all hold the same; towards 1: one holds all. `count_X` are not all 0."""
    ordered = np.sort(count_X)
    n = len(ordered)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * ordered.sum()))


def top_share(count_X: Array) -> float:
    """What the fullest 1 % (at least one) hold of all."""
    most = max(1, round(TOP * len(count_X)))
    return float(np.partition(count_X, -most)[-most:].sum() / count_X.sum())


def spread(count_X: Array, capacity: int) -> Spread:
    """Of counts a row or column that can hold `capacity` entries each; not all are 0."""
    rng = np.random.default_rng(0)
    share = count_X.sum() / (capacity * len(count_X))
    drawn = [rng.binomial(capacity, share, len(count_X)) for _ in range(DRAWS)]
    drawn = [d for d in drawn if d.any()] or [count_X]
    return Spread(
        gini(count_X),
        float(np.mean([gini(d) for d in drawn])),
        top_share(count_X),
        float(np.mean([top_share(d) for d in drawn])),
    )


# --- two sets of entries


@dataclass(frozen=True)
class Overlap:
    """Entries that two updates change. `same_way`: common ones that moved in one direction; None: unknown."""

    first: int
    second: int
    common: int
    common_chance: float
    same_way: int | None = None

    @property
    def jaccard(self) -> float | None:
        """None of two empty sets."""
        union = self.first + self.second - self.common
        return self.common / union if union else None

    @property
    def jaccard_chance(self) -> float | None:
        union = self.first + self.second - self.common_chance
        return self.common_chance / union if union else None

    def as_json(self) -> dict[str, Any]:
        """Every field, and what follows from them."""
        return {
            **asdict(self),
            "jaccard": self.jaccard,
            "jaccard_chance": self.jaccard_chance,
            "o1": self.common / self.first if self.first else None,
            "o2": self.common / self.second if self.second else None,
        }


def overlap(
    first: Mapping[str, TensorPatch], second: Mapping[str, TensorPatch], base: Checkpoint | None = None
) -> Overlap:
    """Of two patches; of the same `base`, if it is given. Raises InputError where tensors do not match."""
    common, chance, same = 0, 0.0, 0
    for name in sorted(set(first) & set(second)):
        a, b = first[name], second[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            raise InputError(
                f"{name} is {a.dtype} {list(a.shape)} in one and {b.dtype} {list(b.shape)} in the other: "
                "compare two updates of one base"
            )
        both, in_a, in_b = np.intersect1d(a.positions, b.positions, assume_unique=True, return_indices=True)
        common += len(both)
        chance += len(a) * len(b) / math.prod(a.shape)
        if base is not None:
            ways = (np.sign(_moves(base, name, one)[at]) for one, at in ((a, in_a), (b, in_b)))
            same += int(np.equal(*ways).sum())
    return Overlap(
        sum(map(len, first.values())),
        sum(map(len, second.values())),
        common,
        chance,
        None if base is None else same,
    )


def _moves(base: Checkpoint, name: str, change: TensorPatch) -> Array:
    """after - before [N] of a tensor's changed entries, in float64."""
    before = _before(base, name, change)
    return values_of(change.applied(before), change.dtype) - values_of(before, change.dtype)


def _before(base: Checkpoint, name: str, change: TensorPatch) -> Array:
    """The base's bits [N], whether `base` has the patch applied or not."""
    now = base.touched_bits(name, change)
    return now if change.state_of(now) == "base" else change.reverted(now)


# --- a run's steps


@dataclass(frozen=True)
class StepUpdate:
    """One step's entries. `fresh`: no step before touched them; `previous`: overlap with the step before."""

    step: int
    touched: int
    fresh: int
    previous: Overlap | None


@dataclass
class History:
    """What a run's steps touched, fed in order. Memory: twelve bytes for each entry touched so far."""

    steps: list[StepUpdate] = field(default_factory=list)
    _touched: dict[str, tuple[Array, Array]] = field(default_factory=dict)  # positions, times
    _last: Mapping[str, TensorPatch] = field(default_factory=dict)

    def add(self, tensors: Mapping[str, TensorPatch]) -> None:
        """The next step's changes."""
        fresh = 0
        for name, tensor in tensors.items():
            old, times = self._touched.get(name, (np.empty(0, np.int64), np.empty(0, np.int32)))
            known = np.isin(tensor.positions, old, assume_unique=True)
            times[np.searchsorted(old, tensor.positions[known])] += 1
            new = tensor.positions[~known]
            fresh += len(new)
            at = np.searchsorted(old, new)
            self._touched[name] = np.insert(old, at, new), np.insert(times, at, 1)
        number = len(self.steps) + 1
        before = overlap(self._last, tensors) if self.steps else None
        self.steps.append(StepUpdate(number, sum(map(len, tensors.values())), fresh, before))
        self._last = tensors

    @property
    def touched(self) -> int:
        """Entries that any step touched."""
        return sum(len(positions) for positions, _ in self._touched.values())

    def times(self) -> list[int]:
        """How many entries were touched by 1, 2, 3, ... steps."""
        counts = np.zeros(len(self.steps) + 1, np.int64)
        for _, times in self._touched.values():
            counts += np.bincount(times, minlength=len(counts))
        return counts[1:].tolist()

    @property
    def persistence(self) -> Overlap | None:
        """All pairs of neighbouring steps together; None before the second."""
        pairs = [s.previous for s in self.steps if s.previous is not None]
        if not pairs:
            return None
        names = ("first", "second", "common", "common_chance")
        return Overlap(*(sum(getattr(p, name) for p in pairs) for name in names))


def history_of(patches: Iterable[Patch]) -> History:
    history = History()
    for patch in patches:
        history.add(patch.tensors)
    return history


def ulp_label(index: int) -> str:
    """Of a class of ULP_LIMITS."""
    first = ULP_LIMITS[index]
    if index + 1 == len(ULP_LIMITS):
        return f"{first:,} or more"
    last = ULP_LIMITS[index + 1] - 1
    return f"{first}" if first == last else f"{first} to {last:,}"


def mean_rank(tensors: Sequence[TensorUpdate]) -> tuple[float, float, float] | None:
    """Mean, least and largest share of full rank; None where no tensor has a rank."""
    shares = [t.rank.share for t in tensors if t.rank is not None]
    return (sum(shares) / len(shares), min(shares), max(shares)) if shares else None


def mean_spread(tensors: Sequence[TensorUpdate], side: str) -> Spread | None:
    """Of `rows` or `columns`: each tensor's, weighed by its changed entries; None where none has one."""
    found = [(getattr(t, side), t.counts.changed_any) for t in tensors if getattr(t, side) is not None]
    if not found:
        return None
    weight = sum(entries for _, entries in found)
    names = ("gini", "gini_chance", "top", "top_chance")
    return Spread(*(sum(getattr(s, name) * entries for s, entries in found) / weight for name in names))
