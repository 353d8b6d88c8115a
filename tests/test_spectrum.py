"""Effective rank: against a dense SVD, and the estimate against the exact one."""

from __future__ import annotations

import numpy as np
import pytest

from frugal_rl.spectrum import ENERGY, Rank, effective_rank


def rank_of(dense: np.ndarray, **options: int) -> Rank:
    row_N, column_N = np.nonzero(dense)
    return effective_rank(row_N, column_N, dense[row_N, column_N], dense.shape, **options)


def sparse(shape: tuple[int, int], share: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape) * np.exp(rng.standard_normal(shape)) * (rng.random(shape) < share)


def low_rank(shape: tuple[int, int], directions: int) -> np.ndarray:
    rng = np.random.default_rng(directions)
    decay = np.exp(-np.arange(directions) * 3 / directions)
    return (rng.standard_normal((shape[0], directions)) * decay) @ rng.standard_normal((directions, shape[1]))


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40)])
@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
def test_it_is_what_a_dense_svd_says(shape: tuple[int, int], share: float) -> None:
    dense = sparse(shape, share)
    sigma = np.linalg.svd(dense, compute_uv=False)
    energy = np.cumsum(sigma**2) / np.sum(sigma**2)
    found = rank_of(dense)
    assert found.effective == int(np.argmax(energy >= ENERGY)) + 1
    assert found.numerical == np.linalg.matrix_rank(dense.astype(np.float32))
    assert (found.full, found.error) == (min(shape), None)


def test_ninety_nine_percent_of_the_energy_are_counted_not_of_the_singular_values() -> None:
    # squares 100, 1, 1: the first holds 98.0 %, two hold 99.02 %
    assert rank_of(np.diag([10.0, 1.0, 1.0])).effective == 2
    assert rank_of(np.diag([10.0, 1.0, 0.01])).effective == 1
    assert rank_of(np.diag([1.0] * 7)).effective == 7


def test_rows_and_columns_without_a_change_do_not_matter_but_for_full_rank() -> None:
    dense = sparse((20, 30), 0.4)
    wide = np.zeros((500, 700))
    wide[np.ix_(np.arange(20) * 25, np.arange(30) * 23)] = dense
    assert rank_of(wide).effective == rank_of(dense).effective
    assert rank_of(wide).full == 500
    assert rank_of(wide).share == rank_of(dense).effective / 500


def test_differences_too_small_to_be_squared_still_count() -> None:
    assert rank_of(np.diag([1e-200, 1e-200, 1e-200])).effective == 3


@pytest.mark.parametrize(
    "dense",
    [
        sparse((300, 700), 0.004),
        sparse((300, 700), 0.3),
        sparse((700, 300), 0.02),
        low_rank((300, 700), 3),
        low_rank((300, 700), 60),
        np.eye(300),
    ],
    ids=["few", "many", "tall", "three directions", "sixty directions", "identity"],
)
def test_the_estimate_is_within_its_error_of_the_exact_rank(dense: np.ndarray) -> None:
    """Two standard errors over 16 probes: 95 % of the time; here for six fixed matrices. The exact one is a
    whole number, so the estimate may be half beside it."""
    exact, estimate = rank_of(dense), rank_of(dense, exact_side=10)
    assert estimate.error is not None and estimate.numerical is None
    assert abs(estimate.effective - exact.effective) <= estimate.error + 1
    assert estimate.error < 0.15 * exact.effective + 1


def test_a_matrix_of_zeros_is_refused() -> None:
    with pytest.raises(ValueError, match="zeros"):
        effective_rank(np.array([1]), np.array([2]), np.array([0.0]), (4, 4))
