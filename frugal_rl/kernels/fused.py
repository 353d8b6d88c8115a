"""What a decode step does between its products: norms, rotations and gates, each in one launch.

Written with PyTorch's operations a layer of Qwen2.5 is 7 products, attention, and about 30 small launches
around them, each over a few thousand numbers; as a launch takes microseconds however little there is to do,
they would take as long as reading the weights does. Here they are four (six where queries and keys are
normed):

- `norm`, `add_norm`: RMSNorm (arXiv 1910.07467), of a sum that is kept as well;
- `rotate_and_keep`: RoPE (arXiv 2104.09864) of queries and keys; keys and values go to their cache entries;
- `gated`: silu(gate) * up (arXiv 2002.05202).

Laws: every one rounds to the compute format where transformers' modules do, after each operation, so what
differs is the order of a norm's sum and the last bit of rsqrt and exp. A row's numbers do not depend on the
rows beside it, equal inputs give equal bits, nothing is specialised on the count of slots.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GATED_BLOCK = 1024
MOST_ROW = 16384  # entries of a row that one program norms


@triton.jit
def _rounded(x, TYPE: tl.constexpr):
    """As stored in TYPE and read again."""
    return x.to(TYPE).to(tl.float32)


@triton.jit
def _norm(x, added, weight, total, out, eps, ADDS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    TYPE: tl.constexpr = out.dtype.element_ty
    i = tl.arange(0, BLOCK)
    inside = i < SIZE
    at = tl.program_id(0).to(tl.int64) * SIZE + i
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        value = _rounded(value + tl.load(added + at, mask=inside, other=0.0).to(tl.float32), TYPE)
        tl.store(total + at, value.to(TYPE), mask=inside)
    scale = tl.rsqrt(tl.sum(value * value, 0) / SIZE + eps)
    factor = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (factor * _rounded(value * scale, TYPE)).to(TYPE), mask=inside)


@triton.jit
def _rotate(
    query,
    key,
    value,
    cos,
    sin,
    entry,
    rotated,
    keys,
    values,
    cos_stride,
    slot_stride,
    head_stride,
    entry_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
):
    """A program a slot and head, the query's first."""
    TYPE: tl.constexpr = rotated.dtype.element_ty
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, PADDED)
    inside = d < SIZE
    first = d < SIZE // 2
    partner = tl.where(first, d + SIZE // 2, d - SIZE // 2)
    c = tl.load(cos + slot * cos_stride + d, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + slot * cos_stride + d, mask=inside, other=0.0).to(tl.float32)
    if head < HEADS:
        at = (slot * HEADS + head) * SIZE
        x = tl.load(query + at + d, mask=inside, other=0.0).to(tl.float32)
        other = tl.load(query + at + partner, mask=inside, other=0.0).to(tl.float32)
        turned = _rounded(x * c, TYPE) + _rounded(tl.where(first, -other, other) * s, TYPE)
        tl.store(rotated + at + d, turned.to(TYPE), mask=inside)
    else:
        at = (slot * KV_HEADS + head - HEADS) * SIZE
        x = tl.load(key + at + d, mask=inside, other=0.0).to(tl.float32)
        other = tl.load(key + at + partner, mask=inside, other=0.0).to(tl.float32)
        turned = _rounded(x * c, TYPE) + _rounded(tl.where(first, -other, other) * s, TYPE)
        place = slot * slot_stride + (head - HEADS).to(tl.int64) * head_stride
        place += tl.load(entry + slot).to(tl.int64) * entry_stride
        tl.store(keys + place + d, turned.to(TYPE), mask=inside)
        tl.store(values + place + d, tl.load(value + at + d, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _gated(gate, up, out, count, BLOCK: tl.constexpr):
    TYPE: tl.constexpr = out.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (_rounded(g / (1.0 + tl.exp(-g)), TYPE) * u).to(TYPE), mask=inside)


def norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension of x [..., D], contiguous; as x."""
    return _launch_norm(x, None, weight_D, eps)[1]


def add_norm(x: Tensor, added: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + added, and its norm; both [..., D], contiguous."""
    return _launch_norm(x, added, weight_D, eps)


def _launch_norm(x: Tensor, added: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    size = x.shape[-1]
    assert size <= MOST_ROW and x.is_contiguous() and weight_D.shape == (size,)
    assert added is None or (added.is_contiguous() and added.shape == x.shape)
    out = torch.empty_like(x)
    total = x if added is None else torch.empty_like(x)
    block = triton.next_power_of_2(size)
    _norm[(x.numel() // size,)](
        x,
        x if added is None else added,
        weight_D,
        total,
        out,
        eps,
        ADDS=added is not None,
        SIZE=size,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )
    return total, out


def rotate_and_keep(
    query_SHD: Tensor,
    key_SKD: Tensor,
    value_SKD: Tensor,
    cos_SD: Tensor,
    sin_SD: Tensor,
    key_SKCD: Tensor,
    value_SKCD: Tensor,
    entry_S: Tensor,
) -> Tensor:
    """The rotated queries [S, H, D]; rotated keys and the values are written to entry_S of the caches.

    The caches may be views with equal strides and D contiguous, cos and sin may be rows of one tensor or one
    row for all slots (stride 0). The dimensions d and d + D / 2 are turned together, as transformers has it.
    """
    slots, heads, size = query_SHD.shape
    kv_heads = key_SKD.shape[1]
    assert query_SHD.is_contiguous() and key_SKD.is_contiguous() and value_SKD.is_contiguous()
    assert cos_SD.stride() == sin_SD.stride() and cos_SD.stride(1) == 1 and cos_SD.shape == (slots, size)
    assert key_SKCD.stride() == value_SKCD.stride() and key_SKCD.stride(3) == 1
    rotated = torch.empty_like(query_SHD)
    _rotate[(slots, heads + kv_heads)](
        query_SHD,
        key_SKD,
        value_SKD,
        cos_SD,
        sin_SD,
        entry_S,
        rotated,
        key_SKCD,
        value_SKCD,
        cos_SD.stride(0),
        *key_SKCD.stride()[:3],
        HEADS=heads,
        KV_HEADS=kv_heads,
        SIZE=size,
        PADDED=triton.next_power_of_2(size),
        num_warps=1,
    )
    return rotated


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of equal shapes, contiguous."""
    assert gate.shape == up.shape and gate.is_contiguous() and up.is_contiguous()
    out = torch.empty_like(gate)
    _gated[(triton.cdiv(gate.numel(), GATED_BLOCK),)](gate, up, out, gate.numel(), BLOCK=GATED_BLOCK)
    return out
