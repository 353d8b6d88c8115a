"""Attention of one query a slot over the slot's own entries in the cache, and no other's.

For slot s with L = length[s] entries, query head h and the KV head k = h // (H / K) that it shares,

    out[s, h] = softmax_{c < L}( scaling * query[s, h] . key[s, k, c] ) . value[s, k, :L].

A program takes the query heads of one KV head (padded to the 16 rows of a tensor core's tile) over one part
of PART_C entries, with a running maximum and sum; a program beyond its slot's length leaves at once, so
that the launch has one shape for all lengths and may be captured in a CUDA graph, and what moves are the
live entries alone. A slot of several parts is put together by the program that comes last, in the order of
the parts (kernels/matmul.py does the same). Parts are cut by a slot's own length: its numbers do not
depend on the slots beside it, nor on which program is last.

Why no library's kernel: PyTorch's SDPA takes lengths as a mask only, and reads, for every slot, as many
entries as the longest has; flex_attention wants torch.compile and a block mask of the lengths made anew each
step; varlen_attn reads a slot's own entries in place from torch 2.12 on (`seqused_k`), this package begins
at 2.9. FlashInfer and flash-attn would be a dependency for this one call.

Source: flash-decoding (Dao et al., 2023, crfm.stanford.edu/2023/10/12/flashdecoding.html); online softmax,
arXiv 1805.02867.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .choice import interpreted

PART_C = 256  # entries a program: four slots of 640 fill a 4090, and a sum is put together from few parts
BLOCK_C = 32  # entries a step: 16 KiB of keys and values at a head size of 128
ROWS = 16  # of a tensor core's tile
MOST_HEAD_SIZE = 256
STAGES = 3
LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["parts"])
def _decode(
    query,
    key,
    value,
    length,
    out,
    partial,
    peak_and_total,
    arrived,
    scaling_log2,
    slot_stride,
    head_stride,
    entry_stride,
    parts,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """partial [S K, parts, GROUP, PADDED], peak_and_total [S K, parts, 2, GROUP]: parts of the longest."""
    shared = tl.program_id(0)  # slot * KV heads + KV head
    part = tl.program_id(1)
    slot = (shared // HEADS).to(tl.int64)
    head = shared % HEADS
    live = tl.load(length + slot).to(tl.int32)
    own_parts = tl.maximum(tl.cdiv(live, PART), 1)  # an empty slot's one part writes zeros
    if part < own_parts:
        g = tl.arange(0, ROWS)
        d = tl.arange(0, PADDED)
        c = tl.arange(0, BLOCK)
        real = (g < GROUP)[:, None] & (d < SIZE)[None, :]
        at = (slot * HEADS + head) * GROUP * SIZE + g[:, None] * SIZE + d[None, :]
        q = tl.load(query + at, mask=real, other=0.0)
        if INTERPRETED:
            q = q.to(tl.float32)
        first = slot * slot_stride + head.to(tl.int64) * head_stride
        peak = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((ROWS,), dtype=tl.float32)
        acc = tl.zeros((ROWS, PADDED), dtype=tl.float32)
        for start in tl.range(part * PART, tl.minimum(part * PART + PART, live), BLOCK, num_stages=STAGES):
            seen = start + c < live
            entry = first + (start + c).to(tl.int64)[:, None] * entry_stride + d[None, :]
            inside = seen[:, None] & (d < SIZE)[None, :]
            k = tl.load(key + entry, mask=inside, other=0.0)
            v = tl.load(value + entry, mask=inside, other=0.0)
            if INTERPRETED:
                k = k.to(tl.float32)
                v = v.to(tl.float32)
            score = tl.dot(q, tl.trans(k)) * scaling_log2
            score = tl.where(seen[None, :], score, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(score, 1))
            decay = tl.exp2(peak - new_peak)
            weight = tl.exp2(score - new_peak[:, None])
            total = total * decay + tl.sum(weight, 1)
            acc = tl.dot(weight.to(v.dtype), v, acc * decay[:, None])
            peak = new_peak
        last = own_parts == 1
        if not last:
            size = GROUP * PADDED
            own = g[:, None] * PADDED + d[None, :]
            sums = partial + shared.to(tl.int64) * parts * size + own
            heads = peak_and_total + shared * parts * 2 * GROUP + g
            used = g < GROUP
            tl.store(sums + part * size, acc, mask=used[:, None])
            tl.store(heads + part * 2 * GROUP, peak, mask=used)
            tl.store(heads + (part * 2 + 1) * GROUP, total, mask=used)
            tl.debug_barrier()  # all of it is written before one of the threads says so
            last = tl.atomic_add(arrived + shared, 1, sem="acq_rel", scope="gpu") == own_parts - 1
            if last:
                tl.debug_barrier()
                peak = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
                total = tl.zeros((ROWS,), dtype=tl.float32)
                acc = tl.zeros((ROWS, PADDED), dtype=tl.float32)
                for other in range(own_parts):
                    peak_at = heads + other * 2 * GROUP
                    other_peak = tl.load(peak_at, mask=used, other=0.0, cache_modifier=".cg")
                    other_total = tl.load(peak_at + GROUP, mask=used, other=0.0, cache_modifier=".cg")
                    new_peak = tl.maximum(peak, other_peak)
                    decay = tl.exp2(peak - new_peak)
                    other_decay = tl.exp2(other_peak - new_peak)
                    total = total * decay + other_total * other_decay
                    sum_at = sums + other * size
                    other_acc = tl.load(sum_at, mask=used[:, None], other=0.0, cache_modifier=".cg")
                    acc = acc * decay[:, None] + other_acc * other_decay[:, None]
                    peak = new_peak
                tl.store(arrived + shared, 0)
        if last:
            acc = acc / tl.where(total > 0, total, 1.0)[:, None]
            tl.store(out + at, acc.to(out.dtype.element_ty), mask=real)


def fits(query: Tensor, key: Tensor) -> bool:
    """Whether the kernel takes them: bf16 (float32 in the interpreter), few enough heads a KV head."""
    dtype = torch.float32 if interpreted() else torch.bfloat16
    group, size = query.shape[1] // key.shape[1], query.shape[-1]
    return query.dtype == key.dtype == dtype and group <= ROWS and size <= MOST_HEAD_SIZE


def decode_attention(
    query_SHD: Tensor, key_SKCD: Tensor, value_SKCD: Tensor, length_S: Tensor, arrived: Tensor, scaling: float
) -> Tensor:
    """Attention [S, H, D] of one query a slot; a slot of length 0 gets zeros. No sync.

    Keys and values may be views of a larger cache with D contiguous and equal strides; C bounds the
    lengths (integers, on the device). `arrived`: at least S K int32 zeros, which are left as zeros.
    """
    slots, heads, size = query_SHD.shape
    kv_heads, entries = key_SKCD.shape[1:3]
    assert key_SKCD.stride() == value_SKCD.stride() and key_SKCD.stride(3) == 1
    query_SHD = query_SHD.contiguous()
    out = torch.empty_like(query_SHD)
    parts = triton.cdiv(entries, PART_C)
    padded = max(ROWS, triton.next_power_of_2(size))
    rows = slots * heads * parts if parts > 1 else 0
    partial = torch.empty(rows * (padded + 2), dtype=torch.float32, device=query_SHD.device)
    _decode[(slots * kv_heads, parts)](
        query_SHD,
        key_SKCD,
        value_SKCD,
        length_S,
        out,
        partial,
        partial[rows * padded :],
        arrived,
        scaling * LOG2_E,
        *key_SKCD.stride()[:3],
        parts,
        HEADS=kv_heads,
        GROUP=heads // kv_heads,
        SIZE=size,
        PADDED=padded,
        ROWS=ROWS,
        PART=PART_C,
        BLOCK=BLOCK_C,
        STAGES=STAGES,
        INTERPRETED=interpreted(),
        num_warps=4,
        num_stages=STAGES,
        enable_fp_fusion=True,
    )
    return out
