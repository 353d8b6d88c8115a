"""Paired statistics against slow twins."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from frugal_rl.evaluate import wilson
from frugal_rl.paired import accuracy, difference, mcnemar, resampled


@pytest.mark.parametrize("ours,theirs", [(0, 0), (1, 0), (0, 5), (3, 3), (2, 7), (9, 1)])
def test_mcnemar_is_the_share_of_coin_sequences_at_least_as_lopsided(ours: int, theirs: int) -> None:
    count = ours + theirs
    splits = [abs(2 * sum(coins) - count) for coins in product((0, 1), repeat=count)]
    expected = sum(split >= abs(ours - theirs) for split in splits) / len(splits)
    assert mcnemar(ours, theirs) == pytest.approx(expected)


def test_an_interval_is_that_of_resampled_seeds_and_problems() -> None:
    rng = np.random.default_rng(1)
    value_SP = (rng.random((3, 40)) < np.array([[0.2], [0.5], [0.8]])).astype(int)
    means = []
    for _ in range(4000):
        seeds, problems = rng.integers(0, 3, 3), rng.integers(0, 40, 40)
        means.append(np.mean([[value_SP[s, p] for p in problems] for s in seeds]))
    low, high = np.percentile(means, [2.5, 97.5])
    found = resampled(value_SP)
    assert found.value == value_SP.mean()
    # two percentiles of a few thousand draws, with a spread of 0.15
    assert (found.low, found.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))


def test_one_seed_gives_the_problems_interval_and_disagreeing_seeds_a_wider_one() -> None:
    rng = np.random.default_rng(2)
    row = (rng.random(400) < 0.5).astype(int)
    alone = resampled(row[None])
    half = 1.96 * np.sqrt(0.25 / 400)
    assert alone.high - alone.low == pytest.approx(2 * half, rel=0.1)
    same = resampled(np.stack([row] * 3))
    assert (same.low, same.high) == pytest.approx((alone.low, alone.high), abs=0.01)
    luck = resampled(np.stack([row, np.ones(400, int), np.zeros(400, int)]))
    assert luck.high - luck.low > 5 * (alone.high - alone.low)


def test_an_accuracys_interval_is_never_a_point() -> None:
    found = accuracy(np.ones((3, 500), int))
    least = wilson(500, 500)
    assert (found.value, found.low, found.high) == (1.0, least.low, 1.0)
    assert found.low < 0.995


def test_equal_answers_differ_by_nothing_and_are_within_noise() -> None:
    rows = np.random.default_rng(3).integers(0, 2, (3, 50))
    found = difference(rows, rows)
    assert (found.interval.value, found.interval.low, found.interval.high) == (0, 0, 0)
    assert found.mcnemar == (1, 1, 1)
    assert found.verdict == "within noise"


def test_pairing_sees_what_unpaired_intervals_do_not() -> None:
    """Two arms that differ on the same 15 of 500 problems: each interval is 8 points wide."""
    rng = np.random.default_rng(4)
    base = np.stack([(rng.random(500) < 0.6).astype(int)] * 3)
    better = base.copy()
    better[:, np.flatnonzero(base[0] == 0)[:15]] = 1
    one, other = accuracy(base), accuracy(better)
    assert one.high > other.low
    found = difference(better, base)
    assert found.verdict == "higher"
    assert difference(base, better).verdict == "lower"
    assert found.interval.value == pytest.approx(0.03)
    assert found.mcnemar == pytest.approx((2 * 0.5**15,) * 3)


def test_a_difference_of_one_lucky_seed_is_within_noise() -> None:
    base = np.zeros((3, 100), int)
    lucky = base.copy()
    lucky[0, :60] = 1
    assert difference(lucky, base).verdict == "within noise"
    assert difference(lucky, base).interval.value == pytest.approx(0.2)
