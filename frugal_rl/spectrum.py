"""How many directions a sparse update needs: its effective rank.

    energy(r) = sum of the r largest sigma^2,   effective rank = the smallest r with energy(r) >= 99 % of all

for the singular values sigma of one matrix's difference. As a share of full rank, min(O, I). The numerical
rank counts sigma > sigma_max * max(O, I) * 2**-23, which is `torch.linalg.matrix_rank` of a float32 matrix.

Rows and columns without a change add only zeros and are left out. What remains, of smaller side m:

- m <= EXACT_SIDE: all eigenvalues of the smaller Gram matrix, in float64;
- above: stochastic Lanczos quadrature. For a random vector v of signs, STEPS of Lanczos on A A^T give nodes
  and weights of the spectral measure of v; averaged over PROBES vectors and multiplied by m they are the
  number of eigenvalues above a threshold, and their energy. The true count of each measure lies between
  the sums without and with the node at the threshold (Chebyshev, Markov, Stieltjes), so half of it is
  taken. `error` is twice the jackknife's standard error over the probes.

Source: effective rank by 99 % of the energy, arXiv 2602.07729; the numerical rank, arXiv 2505.11711
(SagnikMukherjee/sparsity_in_rl, src/update_rank.py); the quadrature, Chen, Trogdon, Ubaru, arXiv 2105.06595.
Differs: theirs is a dense SVD of every matrix, which takes hours for a 7B model on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

ENERGY = 0.99
EXACT_SIDE = 2048  # an eigenvalue problem of this side takes two seconds on one core
PROBES = 16
STEPS = 96
DENSE_SHARE = 1 / 32  # from here on a product with the dense matrix is faster than with its entries
BLOCK = 1 << 22  # entries of a dense block: 32 MiB in float64

Array = npt.NDArray[Any]
Product = Callable[[Array], Array]


@dataclass(frozen=True)
class Rank:
    """`effective` is a whole number where `error` is None (exact); `numerical` is known only there."""

    effective: float
    full: int
    numerical: int | None
    error: float | None

    @property
    def share(self) -> float:
        return self.effective / self.full


def effective_rank(
    row_N: Array, column_N: Array, value_N: Array, shape: tuple[int, int], *, exact_side: int = EXACT_SIDE
) -> Rank:
    """Of the [O, I] matrix that is `value_N` at (row, column), else 0; at least one is not 0."""
    row_N, column_N, value_N = (a[value_N != 0] for a in (row_N, column_N, value_N))
    if not len(value_N):
        raise ValueError("a matrix of zeros has no rank to speak of")
    rows, row_N = np.unique(row_N, return_inverse=True)
    columns, column_N = np.unique(column_N, return_inverse=True)
    if len(rows) > len(columns):
        rows, columns, row_N, column_N = columns, rows, column_N, row_N
    value_N = value_N / np.abs(value_N).max()  # squares of tiny differences must not vanish
    size, full = (len(rows), len(columns)), min(shape)
    if size[0] > exact_side:
        effective, error = _estimated(row_N, column_N, value_N, size)
        return Rank(min(effective, float(full)), full, None, error)
    energy = np.linalg.eigvalsh(_gram(row_N, column_N, value_N, size))[::-1].clip(min=0)
    total = np.cumsum(energy)
    effective = int(np.searchsorted(total, ENERGY * total[-1])) + 1
    least = energy[0] * (max(shape) * 2.0**-23) ** 2
    return Rank(float(effective), full, int((energy > least).sum()), None)


def _gram(row_N: Array, column_N: Array, value_N: Array, size: tuple[int, int]) -> Array:
    """A A^T, from dense blocks of columns."""
    gram = np.zeros((size[0], size[0]))
    order = np.argsort(column_N, kind="stable")
    row_N, column_N, value_N = row_N[order], column_N[order], value_N[order]
    width = max(1, BLOCK // size[0])
    for first in range(0, size[1], width):
        begin, end = np.searchsorted(column_N, [first, first + width])
        block = np.zeros((size[0], min(width, size[1] - first)))
        block[row_N[begin:end], column_N[begin:end] - first] = value_N[begin:end]
        gram += block @ block.T
    return gram


def _estimated(row_N: Array, column_N: Array, value_N: Array, size: tuple[int, int]) -> tuple[float, float]:
    """The effective rank by quadrature, and twice its standard error."""
    product = _product(row_N, column_N, value_N, size)
    node_PS, weight_PS = _quadrature(product, size[0])
    every = np.arange(PROBES)
    effective = _count(node_PS, weight_PS) * size[0]
    left_out = [_count(node_PS[every != p], weight_PS[every != p]) * size[0] for p in every]
    spread = np.sqrt((PROBES - 1) / PROBES * np.sum((np.array(left_out) - np.mean(left_out)) ** 2))
    return effective, 2 * float(spread)


def _count(node_PS: Array, weight_PS: Array) -> float:
    """The share of eigenvalues that hold ENERGY of the sum of all, by nodes and weights."""
    order = np.argsort(node_PS, axis=None)[::-1]
    node, weight = node_PS.ravel()[order].clip(min=0), weight_PS.ravel()[order] / len(weight_PS)
    energy = np.cumsum(node * weight)
    middle_energy, middle_count = energy - node * weight / 2, np.cumsum(weight) - weight / 2
    return float(np.interp(ENERGY * energy[-1], middle_energy, middle_count))


def _product(row_N: Array, column_N: Array, value_N: Array, size: tuple[int, int]) -> Product:
    """x -> A A^T x for x of [rows, P]."""
    if len(value_N) > DENSE_SHARE * size[0] * size[1]:
        dense = np.zeros(size, np.float32)
        dense[row_N, column_N] = value_N
        return lambda x: np.asarray(dense @ (dense.T @ x.astype(np.float32)), np.float64)
    forward, backward = _sums_by(row_N, column_N, value_N), _sums_by(column_N, row_N, value_N)
    return lambda x: forward(backward(x))


def _sums_by(to_N: Array, from_N: Array, value_N: Array) -> Product:
    """x -> sum of value * x[from] for each `to`; every `to` from 0 on occurs."""
    order = np.argsort(to_N, kind="stable")
    begin = np.searchsorted(to_N[order], np.arange(int(to_N.max()) + 1))
    source, value = from_N[order], value_N[order][:, None]
    return lambda x: np.add.reduceat(value * x[source], begin, axis=0)


def _quadrature(product: Product, size: int) -> tuple[Array, Array]:
    """Nodes and weights [P, S] of PROBES random vectors, by Lanczos with full orthogonalisation."""
    rng = np.random.default_rng(0)
    steps = min(STEPS, size)
    basis_SMP = np.zeros((steps, size, PROBES))
    diagonal_SP, below_SP = np.zeros((steps, PROBES)), np.zeros((steps, PROBES))
    vector_MP = rng.choice([-1.0, 1.0], (size, PROBES)) / np.sqrt(size)
    for step in range(steps):
        basis_SMP[step] = vector_MP
        next_MP = product(vector_MP)
        diagonal_SP[step] = (vector_MP * next_MP).sum(0)
        for _ in range(2):  # once loses what float64 has lost, twice is enough
            known = basis_SMP[: step + 1]
            next_MP = next_MP - np.einsum("smp,sp->mp", known, np.einsum("smp,mp->sp", known, next_MP))
        below_SP[step] = np.sqrt((next_MP**2).sum(0))
        # a space that is exhausted couples to nothing further
        exhausted = below_SP[step] <= 1e-10 * np.abs(diagonal_SP[: step + 1]).max(0)
        below_SP[step][exhausted] = 0
        vector_MP = np.where(exhausted, 0, next_MP / np.where(exhausted, 1, below_SP[step]))
    nodes, weights = [], []
    for p in range(PROBES):
        coupling = below_SP[:-1, p]
        node, state = np.linalg.eigh(
            np.diag(diagonal_SP[:, p]) + np.diag(coupling, 1) + np.diag(coupling, -1)
        )
        nodes.append(node)
        weights.append(state[0] ** 2)
    return np.array(nodes), np.array(weights)
