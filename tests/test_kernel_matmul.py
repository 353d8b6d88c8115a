"""Products with int8 matrices and the patch over them, against the dequantised policy.

The same tests run on a GPU where there is one, in bf16; on a CPU in Triton's interpreter, in float32.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from frugal_rl.storage import Overlay, Quantised, bits_of

from .conftest import needs_triton

pytestmark = needs_triton
if torch.cuda.is_available():
    DEVICE, DTYPE, TOLERANCE = torch.device("cuda"), torch.bfloat16, 1e-2  # a result is rounded to 8 bits
else:
    DEVICE, DTYPE, TOLERANCE = torch.device("cpu"), torch.float32, 1e-5  # only sums have another order


def make_matrix(rows: int, width: int, seed: int = 0) -> Quantised:
    torch.manual_seed(seed)
    held = Quantised.of(torch.randn(rows, width) * 0.1)
    return Quantised(held.code_OI.to(DEVICE), held.absmax_O.to(DEVICE))


def put(held: Quantised, position_N: Tensor, policy_N: Tensor) -> None:
    """Change those entries; positions sorted, values bf16."""
    held.overlay = Overlay(position_N.to(DEVICE), bits_of(policy_N.bfloat16()).to(DEVICE))


def change_some(held: Quantised, share: float, *, scale: float = 0.1) -> None:
    """About that share of the entries, the first and the last among them, to values anywhere near 0."""
    chosen = torch.rand(held.code_OI.numel()) < share
    chosen[0] = chosen[-1] = True
    position_N = torch.nonzero(chosen)[:, 0]
    put(held, position_N, torch.randn(len(position_N)) * scale)


def kernel_matrix(held: Quantised):
    from frugal_rl.kernels.matmul import Inputs, Matrix

    entries = held.difference()
    changed = (
        entries.position_N,
        entries.before_bits_N.view(held.dtype),
        entries.after_bits_N.view(held.dtype),
    )
    return Matrix(held.code_OI, held.absmax_O, changed, Inputs())


def inputs(tokens: int, width: int) -> Tensor:
    torch.manual_seed(tokens)
    return torch.randn(tokens, width).to(DEVICE, DTYPE)


def dense(held: Quantised, x_MI: Tensor) -> Tensor:
    """The slow twin: the whole policy dequantised, in float64."""
    return x_MI.double() @ held.rows(slice(0, held.shape[0]), torch.float32).double().T


def check(held: Quantised, tokens: int, **options: object) -> None:
    x_MI = inputs(tokens, held.shape[1])
    got_MO = kernel_matrix(held).product(x_MI, **options)
    want_MO = dense(held, x_MI)
    assert got_MO.shape == want_MO.shape
    assert float((got_MO - want_MO).abs().max() / want_MO.abs().max()) < TOLERANCE


@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 40, 100, 128])
@pytest.mark.parametrize(("rows", "width"), [(70, 96), (192, 256)])
def test_products_are_those_of_the_dequantised_matrix(rows, width, tokens):
    check(make_matrix(rows, width), tokens)


@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_a_patch_counts_with_its_exact_bits(tokens):
    held = make_matrix(70, 200)
    change_some(held, 0.05)
    check(held, tokens)


def test_values_far_from_the_base_are_exact_too():
    """The policy minus the base is then no bf16 number: with x = 1 at one column, y is the value itself."""
    held = make_matrix(64, 64)
    column = torch.arange(64) * 64 + 3
    put(held, column, torch.logspace(-12, 3, 64) * (-1) ** torch.arange(64))
    x_MI = torch.zeros(5, 64, dtype=DTYPE, device=DEVICE)
    x_MI[2, 3] = 1
    matrix = kernel_matrix(held)
    assert len(matrix.entries.entry_N) > 64  # some take two
    got_O = matrix.product(x_MI, dtype=torch.float32)[2]
    # what is left of the base after it is taken away again is float32's rounding of it
    torch.testing.assert_close(got_O, held.rows(slice(0, 64), torch.float32)[:, 3], rtol=2**-22, atol=2**-26)


@pytest.mark.parametrize("row", [0, 33, 69])
def test_a_row_may_have_changed_as_a_whole(row):
    held = make_matrix(70, 200)
    put(held, torch.arange(row * 200, (row + 1) * 200), torch.randn(200))
    check(held, 18)


def test_every_entry_may_have_changed():
    held = make_matrix(66, 130)
    put(held, torch.arange(66 * 130), torch.randn(66 * 130))
    check(held, 5)


def test_no_patch_is_no_work():
    assert kernel_matrix(make_matrix(64, 64)).entries is None


def test_programs_that_share_a_block_of_rows_add_up():
    from frugal_rl.kernels.matmul import choose

    held = make_matrix(64, 1600)
    change_some(held, 0.01)
    assert choose(20, 64, 1600, 8).parts > 1
    check(held, 20)


def test_equal_inputs_give_equal_bits():
    """Of several products in a row: the counters are back at 0 after each."""
    held = make_matrix(130, 1000)
    change_some(held, 0.01)
    matrix, x_MI = kernel_matrix(held), inputs(33, 1000)
    first_MO = matrix.product(x_MI)
    assert not matrix.arrived.any()
    assert all(torch.equal(matrix.product(x_MI), first_MO) for _ in range(2))


def test_the_bias_is_added_and_the_output_may_be_float32():
    held, x_MI = make_matrix(70, 96), inputs(3, 96)
    bias_O = torch.randn(70).to(DEVICE, DTYPE)
    got_MO = kernel_matrix(held).product(x_MI[:, None], bias_O, torch.float32)
    assert got_MO.dtype == torch.float32
    want_MO = dense(held, x_MI) + bias_O.double()
    # x and the weights are bf16 numbers either way: float32 sums alone
    torch.testing.assert_close(got_MO[:, 0].double(), want_MO, rtol=1e-5, atol=1e-5)


def test_an_input_written_to_is_transposed_anew():
    held = make_matrix(64, 64)
    change_some(held, 0.05)
    matrix, x_MI = kernel_matrix(held), inputs(9, 64)
    matrix.product(x_MI)
    x_MI.mul_(2)
    got_MO = matrix.product(x_MI)
    assert torch.equal(got_MO, kernel_matrix(held).product(x_MI))


@pytest.mark.parametrize("processors", [82, 128, 132, 170])
@pytest.mark.parametrize("tokens", [1, 16, 64, 128])
def test_no_program_is_without_a_step_and_the_device_is_full_or_the_steps_few(tokens, processors):
    from frugal_rl.kernels.matmul import LEAST_STEPS, MOST_PARTS, PROGRAMS_PER_SM, choose

    for rows, width in [(256, 1536), (512, 3584), (3584, 3584), (18944, 3584), (3584, 18944), (152064, 3584)]:
        c = choose(tokens, rows, width, processors)
        steps, blocks = -(-width // c.block_i), -(-rows // c.block_o)
        share = -(-steps // c.parts)
        assert (c.parts - 1) * share < steps
        enough = 2 * blocks * c.parts > PROGRAMS_PER_SM * processors  # more than half of what fits
        assert enough or share <= 2 * LEAST_STEPS or c.parts == MOST_PARTS
