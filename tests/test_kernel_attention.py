"""Attention of one query a slot over its own entries, against one slot at a time in float64.

The same tests run on a GPU where there is one, in bf16; on a CPU in Triton's interpreter, in float32.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .conftest import needs_triton

pytestmark = needs_triton
if torch.cuda.is_available():
    DEVICE, DTYPE, TOLERANCE = torch.device("cuda"), torch.bfloat16, 2e-2  # weights and results have 8 bits
else:
    DEVICE, DTYPE, TOLERANCE = torch.device("cpu"), torch.float32, 1e-5  # only sums have another order


def make(lengths: list[int], *, heads: int, kv_heads: int, size: int, entries: int) -> tuple[Tensor, ...]:
    """A query a slot, and views of a longer cache whose dead entries are NaN."""
    torch.manual_seed(0)
    slots = len(lengths)
    query = torch.randn(slots, heads, size)
    cache = torch.full((2, slots + 1, kv_heads, entries + 5, size), torch.nan)
    for slot, length in enumerate(lengths):
        cache[:, slot, :, :length] = torch.randn(2, kv_heads, length, size)
    key, value = cache.to(DEVICE, DTYPE)[:, :slots, :, :entries]
    return query.to(DEVICE, DTYPE), key, value, torch.tensor(lengths, device=DEVICE)


def run(query: Tensor, key: Tensor, value: Tensor, length: Tensor) -> Tensor:
    from frugal_rl.kernels.attention import decode_attention, fits

    assert fits(query, key)
    arrived = torch.zeros(key.shape[:2], dtype=torch.int32, device=DEVICE)
    out = decode_attention(query, key, value, length, arrived, query.shape[-1] ** -0.5)
    assert not arrived.any()
    return out


def slow(query: Tensor, key: Tensor, value: Tensor, length: Tensor) -> Tensor:
    out = torch.zeros_like(query, dtype=torch.float64)
    group = query.shape[1] // key.shape[1]
    for slot, live in enumerate(length.tolist()):
        for head in range(query.shape[1] if live else 0):
            key_CD, value_CD = (x[slot, head // group, :live].double() for x in (key, value))
            score_C = key_CD @ query[slot, head].double() * query.shape[-1] ** -0.5
            out[slot, head] = torch.softmax(score_C, 0) @ value_CD
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (7, 1)])
@pytest.mark.parametrize("size", [16, 80, 128])
def test_each_slot_sees_its_own_entries_and_no_dead_one(heads, kv_heads, size):
    parts = make([1, 33, 7, 64], heads=heads, kv_heads=kv_heads, size=size, entries=64)
    torch.testing.assert_close(run(*parts).double(), slow(*parts), rtol=TOLERANCE, atol=TOLERANCE)


def test_an_empty_slot_gets_zeros():
    parts = make([0, 5], heads=4, kv_heads=2, size=16, entries=40)
    got = run(*parts)
    assert not got[0].any() and got[1].any()


def test_long_slots_are_put_together_from_parts():
    """Around the parts' ends, beside a short slot and an empty one."""
    parts = make([300, 256, 257, 3, 0, 600], heads=2, kv_heads=1, size=16, entries=600)
    torch.testing.assert_close(run(*parts).double(), slow(*parts), rtol=TOLERANCE, atol=TOLERANCE)


def test_equal_inputs_give_equal_bits_and_other_slots_change_none():
    query, key, value, length = make([300, 513, 2], heads=2, kv_heads=1, size=16, entries=600)
    both = run(query, key, value, length)
    assert torch.equal(run(query, key, value, length), both)
    alone = run(query[:1], key[:1, :, :300], value[:1, :, :300], length[:1])
    assert torch.equal(alone, both[:1])


def test_what_the_kernel_cannot_take_is_said():
    from frugal_rl.kernels.attention import fits

    query, key, _, _ = make([3], heads=17, kv_heads=1, size=16, entries=8)
    assert not fits(query, key)
    assert not fits(query.half(), key.half())
