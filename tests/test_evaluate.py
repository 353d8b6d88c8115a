"""Intervals and pass@k against hand-computed and brute-force numbers."""

from __future__ import annotations

import itertools

import pytest

from frugal_rl.evaluate import mean_score, pass_at_k, wilson


def test_wilsons_interval_is_the_textbook_one() -> None:
    # 8 of 10: (0.8 + z2/20 -+ z sqrt(0.016 + z2/400)) / (1 + z2/10) with z2 = 3.841459
    score = wilson(8, 10)
    assert (score.value, score.problems) == (0.8, 10)
    assert score.low == pytest.approx(0.490162, abs=1e-6)
    assert score.high == pytest.approx(0.943318, abs=1e-6)


@pytest.mark.parametrize("correct,total", [(0, 5), (5, 5), (0, 1), (1, 1)])
def test_wilsons_interval_stays_within_0_and_1_and_is_never_empty(correct: int, total: int) -> None:
    score = wilson(correct, total)
    assert 0.0 <= score.low <= score.value <= score.high <= 1.0
    assert score.high - score.low > 0.1


@pytest.mark.parametrize("n,k", [(1, 1), (4, 1), (4, 2), (5, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n: int, k: int) -> None:
    for correct in range(n + 1):
        subsets = list(itertools.combinations(range(n), k))
        hits = sum(any(i < correct for i in subset) for subset in subsets)
        assert pass_at_k(n, correct, k) == pytest.approx(hits / len(subsets))


def test_a_mean_score_has_a_normal_interval_over_problems() -> None:
    score = mean_score([0.0, 0.5, 1.0, 0.5])
    # variance (0.25 + 0 + 0.25 + 0) / 3, standard error sqrt(0.5 / 3 / 4) = 0.204124
    assert score.value == 0.5
    assert score.low == pytest.approx(0.5 - 1.959964 * 0.204124, abs=1e-5)
    assert score.high == pytest.approx(0.5 + 1.959964 * 0.204124, abs=1e-5)


def test_one_problem_says_nothing_about_others() -> None:
    assert (mean_score([1.0]).low, mean_score([1.0]).high) == (0.0, 1.0)
