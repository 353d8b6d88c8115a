"""Is one policy better than another? Answers of both to the same problems, over the same seeds.

correct_SP: 1 or 0, seeds by problems. Problems differ in difficulty and runs in luck, and both are drawn
from something larger, so an interval resamples both: a bootstrap of 10,000 draws of S seeds and P problems
with replacement, crossed, percentiles 2.5 and 97.5. Pairing is by problem and by seed. A difference whose
interval has 0 in it is within noise; with three seeds an interval is rough, and says so by being wide.

For two runs alone, McNemar's exact test: of the problems that only one of them solves, is the split a coin's?

Where bootstrap resamples cannot vary (every answer correct), an accuracy's interval is at least as wide as
Wilson's for so many problems.

Source: McNemar 1947, exact binomial form; crossed resampling: Owen 2007, "The pigeonhole bootstrap".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .evaluate import wilson

DRAWS = 10_000
CHUNK = 500  # draws at a time


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Of two arms' accuracy: `interval`, and McNemar's exact p of each seed's pair of runs."""

    interval: Interval
    mcnemar: tuple[float, ...]

    @property
    def verdict(self) -> str:
        if self.interval.low > 0:
            return "higher"
        return "lower" if self.interval.high < 0 else "within noise"


def resampled(value_SP: np.ndarray, *, seed: int = 0) -> Interval:
    """Mean over seeds and problems. One seed is not resampled: then the interval is over problems alone."""
    rng = np.random.default_rng(seed)
    seeds, problems = value_SP.shape
    means = []
    for start in range(0, DRAWS, CHUNK):
        draws = min(CHUNK, DRAWS - start)
        weight_NP = rng.multinomial(problems, np.full(problems, 1 / problems), size=draws)
        weight_NS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)
        means.append(((weight_NS @ value_SP) * weight_NP).sum(1) / (seeds * problems))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(float(value_SP.mean()), float(low), float(high))


def accuracy(correct_SP: np.ndarray) -> Interval:
    """The wider at each end of the bootstrap's interval and Wilson's over the problems."""
    found = resampled(correct_SP)
    problems = correct_SP.shape[1]
    least = wilson(round(found.value * problems), problems)
    return Interval(found.value, min(found.low, least.low), max(found.high, least.high))


def difference(ours_SP: np.ndarray, theirs_SP: np.ndarray) -> Difference:
    """Ours less theirs; the rows are the same seeds and the columns the same problems."""
    signed_SP = ours_SP.astype(np.int64) - theirs_SP.astype(np.int64)
    tests = [mcnemar(int((row > 0).sum()), int((row < 0).sum())) for row in signed_SP]
    return Difference(resampled(signed_SP), tuple(tests))


def mcnemar(only_ours: int, only_theirs: int) -> float:
    """Two-sided exact p of a split of discordant pairs, each a fair coin."""
    count = only_ours + only_theirs
    tail = sum(math.comb(count, k) for k in range(min(only_ours, only_theirs) + 1))
    return min(1.0, 2 * tail / 2**count)
