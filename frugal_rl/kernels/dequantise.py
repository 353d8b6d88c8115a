"""Rows of an int8 matrix with its changed entries laid over them, in one launch and without a sync.

    out[o, i] = overlay[o, i] where changed, else bf16( code[o, i] * absmax[o] * float32(1 / 127) )

A program takes one tile: up to TILE entries of one row. It writes the base, and then the changed entries of
its tile, which `tile_begins` has found once for all uses of the overlay: 4 bytes for up to 2048 entries. A
second launch that scatters the overlay would cost a launch more, and for some rows alone a sync, or a search
of the whole overlay, to learn which entries are theirs. Traffic: 3 bytes an entry (bf16), and for each
changed one its 10 bytes and a sector of 32.

Invariants: the bits of storage.Quantised's plain path. Products are rounded one by one (no fused
multiply-add), and float32 is rounded to bf16 in integers, to nearest even, on every device alike.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FORMATS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
LEAST_TILE, TILE = 32, 2048  # entries of a program, 16 a thread; a word of the map in propose.py has 32
OVERLAID = 32  # changed entries of a tile that are written at a time


@triton.jit
def value_of(bits, FORMAT: tl.constexpr):
    """float32 numbers from the bits of a format of FORMATS, as int32."""
    if FORMAT == 0:
        value = (bits << 16).to(tl.float32, bitcast=True)
    elif FORMAT == 1:
        value = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = bits.to(tl.float32, bitcast=True)
    return value


@triton.jit
def bits_from(value, FORMAT: tl.constexpr):
    """Inverse of `value_of`, rounding to nearest even; sign-extended to int32."""
    if FORMAT == 0:
        word = value.to(tl.int32, bitcast=True)
        rounded = (word + (((word >> 16) & 1) + 0x7FFF)) >> 16
        bits = tl.where(value == value, rounded, 0x7FC0)
    elif FORMAT == 1:
        bits = value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    else:
        bits = value.to(tl.int32, bitcast=True)
    return bits


@triton.jit(do_not_specialize=["first_row"])
def _dequantise(
    code_OI,
    absmax_O,
    out_bits_RI,
    position_N,
    changed_bits_N,
    begin_X,
    first_row,
    width,
    reciprocal,
    FORMAT: tl.constexpr,
    OUT: tl.constexpr,
    HAS_OVERLAY: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0)
    row = (first_row + place).to(tl.int64)
    out_row = out_bits_RI + place.to(tl.int64) * width
    column_X = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_X = column_X < width
    code_X = tl.load(code_OI + row * width + column_X, mask=inside_X, other=0)
    value_X = code_X.to(tl.float32) * tl.load(absmax_O + row) * reciprocal
    bits_X = bits_from(value_X, FORMAT)
    if OUT != FORMAT:
        bits_X = bits_from(value_of(bits_X, FORMAT), OUT)
    tl.store(out_row + column_X, bits_X.to(out_bits_RI.dtype.element_ty), mask=inside_X)
    if HAS_OVERLAY:
        tile = row * tl.num_programs(1) + tl.program_id(1)
        begin, end = tl.load(begin_X + tile), tl.load(begin_X + tile + 1)
        if begin < end:
            tl.debug_barrier()  # other threads of this program have written the base
            for start in range(begin, end, LANES):
                slot_L = start + tl.arange(0, LANES)
                there_L = slot_L < end
                index_L = tl.load(position_N + slot_L, mask=there_L, other=0) - row * width
                bits_L = tl.load(changed_bits_N + slot_L, mask=there_L, other=0).to(tl.int32)
                if OUT != FORMAT:
                    bits_L = bits_from(value_of(bits_L, FORMAT), OUT)
                tl.store(out_row + index_L, bits_L.to(out_bits_RI.dtype.element_ty), mask=there_L)


def tile_of(width: int) -> int:
    """Entries of a tile, a power of two: a row is cut into as few as TILE allows."""
    return max(LEAST_TILE, min(TILE, triton.next_power_of_2(width)))


def tile_begins(position_N: Tensor, rows: int, width: int) -> Tensor:
    """For each tile of a matrix its first slot among sorted flat positions, and their count [tiles + 1]."""
    tile = tile_of(width)
    start_S = torch.arange(0, width, tile, device=position_N.device)
    start_OS = torch.arange(rows, device=position_N.device)[:, None] * width + start_S
    begin_X = torch.searchsorted(position_N, start_OS.view(-1), out_int32=True)
    return torch.cat([begin_X, begin_X.new_full((1,), len(position_N))])


def dequantise_(
    out_bits_RI: Tensor,
    code_OI: Tensor,
    absmax_O: Tensor,
    overlay: tuple[Tensor, Tensor, Tensor] | None,
    first_row: int,
    reciprocal: float,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> None:
    """Fill `out` with rows from `first_row` on of a matrix whose values are of `dtype`. In place.

    `out_bits_RI`: the integers of storage.bits_of for a tensor of `out_dtype`, by rows. `overlay`: sorted
    flat positions, bits, and their `tile_begins`.
    """
    rows, width = out_bits_RI.shape
    if not rows:
        return
    tile = tile_of(width)
    position_N, bits_N, begin_X = overlay or (code_OI, out_bits_RI, absmax_O)  # unread where there is none
    _dequantise[rows, triton.cdiv(width, tile)](
        code_OI,
        absmax_O,
        out_bits_RI,
        position_N,
        bits_N,
        begin_X,
        first_row,
        width,
        reciprocal,
        FORMAT=FORMATS[dtype],
        OUT=FORMATS[out_dtype],
        HAS_OVERLAY=overlay is not None,
        LANES=OVERLAID,
        BLOCK=tile,
        enable_fp_fusion=False,
    )
