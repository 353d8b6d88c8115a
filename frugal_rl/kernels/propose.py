"""What a gradient would change, in one pass over it: update rule, squared norm, and the entries in order.

The rule is storage.py's. For a tile (dequantise.py) one program reads gradient and weights once and writes a
bit an entry (would it change?), their count and the tile's sum of squares; a prefix sum over the counts says
where each tile's entries go, one number is fetched to allocate exactly, and a second launch reads the bits
and gathers the few that are set. So the entries come in ascending order of position, whatever runs when.

Traffic, an entry: 4 bytes of gradient, 2 (bf16) or 1 (int8) of weight, 1/8 written and 1/8 read again; for
each kept one (some in a thousand) two sectors of 32 bytes and 10 bytes written. Launches: two, and three of
PyTorch's for the sums. Syncs: one.

An int8 matrix's changed entries lie in its overlay: the first pass treats them as unchanged, and then flips
the bits of those few for which that was wrong, each by itself.

Invariants: entries, positions and bits are those of storage.rounded (no fused multiply-add; to nearest even).
The square is summed in float32 within a tile and in float64 across tiles in a fixed order: the same bits in
every run, and within 1e-6 of weights.sum_of_squares.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dequantise import FORMATS, OVERLAID, bits_from, tile_of, value_of

WORD = tl.constexpr(32)  # bits of a word of the map
# 1.5 * 2**23: adding it and taking it off rounds |x| < 2**22 to integers, half to even, and -0 to 0
NEAREST = tl.constexpr(12582912.0)
LIMIT = tl.constexpr(128)  # units: from there bf16's own grid is as coarse (storage.py)
UNIT = tl.constexpr(2.0**-9)  # u over the power of two in the quantisation step
EXPONENT = tl.constexpr(0x7F800000)  # its field in a float32
INVERSE = tl.constexpr(0x7F000000)  # minus the bits of a power of two: those of its inverse


@triton.jit
def _base_bits(code_X, absmax, reciprocal, FORMAT: tl.constexpr):
    return bits_from(code_X.to(tl.float32) * absmax * reciprocal, FORMAT)


@triton.jit
def _changes(
    before_bits_X,
    gradient_X,
    code_X,
    absmax,
    step,
    reciprocal,
    least_absmax,
    FORMAT: tl.constexpr,
    QUANTISED: tl.constexpr,
):
    """Whether each entry would have other bits after the step."""
    exact_X = value_of(before_bits_X, FORMAT) - step * gradient_X
    after_bits_X = bits_from(exact_X, FORMAT)
    if QUANTISED:
        quarter = tl.maximum(absmax, least_absmax) * reciprocal
        power = quarter.to(tl.int32, bitcast=True) & EXPONENT
        unit = power.to(tl.float32, bitcast=True) * UNIT
        inverse = (-unit.to(tl.int32, bitcast=True) + INVERSE).to(tl.float32, bitcast=True)
        on_grid_X = ((exact_X * inverse + NEAREST) - NEAREST) * unit
        coarse_X = (code_X == 0) & (tl.abs(exact_X) < unit * LIMIT)
        after_bits_X = tl.where(coarse_X, bits_from(on_grid_X, FORMAT), after_bits_X)
    return after_bits_X != before_bits_X


@triton.jit(do_not_specialize=["first_row"])
def _mark(
    gradient_RI,
    row_R,
    weight_OI,
    absmax_O,
    step_1,
    position_N,
    changed_bits_N,
    begin_X,
    map_X,
    count_X,
    square_X,
    first_row,
    width,
    reciprocal,
    least_absmax,
    FORMAT: tl.constexpr,
    QUANTISED: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_OVERLAY: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tile = place * tl.num_programs(1) + segment
    row = first_row + place
    if HAS_ROWS:
        row = tl.load(row_R + place)
    step = tl.load(step_1)
    column_X = segment * BLOCK + tl.arange(0, BLOCK)
    inside_X = column_X < width
    gradient_X = tl.load(gradient_RI + place * width + column_X, mask=inside_X, other=0).to(tl.float32)
    weight_X = tl.load(weight_OI + row * width + column_X, mask=inside_X, other=0).to(tl.int32)
    absmax = 0.0
    before_X = weight_X
    if QUANTISED:
        absmax = tl.load(absmax_O + row)
        before_X = _base_bits(weight_X, absmax, reciprocal, FORMAT)
    would_X = _changes(
        before_X, gradient_X, weight_X, absmax, step, reciprocal, least_absmax, FORMAT, QUANTISED
    )
    flag_X = (would_X & inside_X).to(tl.int32)
    lane_B = tl.arange(0, WORD)
    word_W = tl.sum(tl.reshape(flag_X, (BLOCK // WORD, WORD)) << lane_B[None, :], axis=1)
    words = map_X + tile * (BLOCK // WORD)
    tl.store(words + tl.arange(0, BLOCK // WORD), word_W)
    tl.store(square_X + tile, tl.sum(gradient_X * gradient_X, axis=0))
    count = tl.sum(flag_X, axis=0)
    if HAS_OVERLAY:
        own = row * tl.num_programs(1) + segment
        begin, end = tl.load(begin_X + own), tl.load(begin_X + own + 1)
        if begin < end:
            tl.debug_barrier()  # other threads of this program have written the words
            for start in range(begin, end, LANES):
                slot_L = start + tl.arange(0, LANES)
                there_L = slot_L < end
                index_L = tl.load(position_N + slot_L, mask=there_L, other=0) - row * width
                index_L = tl.where(there_L, index_L, segment * BLOCK)
                now_L = tl.load(changed_bits_N + slot_L, mask=there_L, other=0).to(tl.int32)
                slope_L = tl.load(gradient_RI + place * width + index_L).to(tl.float32)
                code_L = tl.load(weight_OI + row * width + index_L).to(tl.int32)
                base_L = _base_bits(code_L, absmax, reciprocal, FORMAT)
                was_L = _changes(
                    base_L, slope_L, code_L, absmax, step, reciprocal, least_absmax, FORMAT, True
                )
                is_L = _changes(now_L, slope_L, code_L, absmax, step, reciprocal, least_absmax, FORMAT, True)
                local_L = (index_L - segment * BLOCK).to(tl.int32)
                bit_L = tl.full((LANES,), 1, tl.int32) << (local_L % WORD)
                tl.atomic_xor(words + local_L // WORD, bit_L, mask=there_L & (was_L != is_L))
                count += tl.sum(tl.where(there_L, is_L.to(tl.int32) - was_L.to(tl.int32), 0), axis=0)
    tl.store(count_X + tile, count)


@triton.jit(do_not_specialize=["first_row"])
def _gather(
    gradient_RI,
    row_R,
    weight_OI,
    absmax_O,
    overlay_N,
    changed_bits_N,
    begin_X,
    map_X,
    start_X,
    position_N,
    gradient_N,
    before_bits_N,
    first_row,
    width,
    reciprocal,
    FORMAT: tl.constexpr,
    QUANTISED: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_OVERLAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tile = place * tl.num_programs(1) + segment
    first, last = tl.load(start_X + tile), tl.load(start_X + tile + 1)
    if first < last:
        row = first_row + place
        if HAS_ROWS:
            row = tl.load(row_R + place)
        local_X = tl.arange(0, BLOCK)
        word_X = tl.load(map_X + tile * (BLOCK // WORD) + local_X // WORD)
        flag_X = (word_X >> (local_X % WORD)) & 1
        kept_X = flag_X == 1
        slot_X = first + tl.cumsum(flag_X, axis=0) - 1
        column_X = segment * BLOCK + local_X
        gradient_X = tl.load(gradient_RI + place * width + column_X, mask=kept_X, other=0).to(tl.float32)
        before_X = tl.load(weight_OI + row * width + column_X, mask=kept_X, other=0).to(tl.int32)
        if QUANTISED:
            before_X = _base_bits(before_X, tl.load(absmax_O + row), reciprocal, FORMAT)
        if HAS_OVERLAY:
            own = row * tl.num_programs(1) + segment
            begin, end = tl.load(begin_X + own), tl.load(begin_X + own + 1)
            if begin < end:  # each kept entry looks for itself among the tile's changed ones
                low_X = tl.zeros((BLOCK,), tl.int32) + begin
                wanted_X = row * width + column_X
                count = end - begin
                while count > 1:
                    half = count // 2
                    middle_X = tl.load(overlay_N + low_X + half, mask=kept_X, other=0)
                    low_X = tl.where(middle_X <= wanted_X, low_X + half, low_X)
                    count -= half
                found_X = kept_X & (tl.load(overlay_N + low_X, mask=kept_X, other=-1) == wanted_X)
                now_X = tl.load(changed_bits_N + low_X, mask=found_X, other=0).to(tl.int32)
                before_X = tl.where(found_X, now_X, before_X)
        flat_X = (row * width + column_X).to(position_N.dtype.element_ty)
        tl.store(position_N + slot_X, flat_X, mask=kept_X)
        tl.store(gradient_N + slot_X, gradient_X, mask=kept_X)
        tl.store(before_bits_N + slot_X, before_X.to(before_bits_N.dtype.element_ty), mask=kept_X)


@dataclass(frozen=True)
class Below:
    """The weights under a gradient, as tensors: bits of a format, or codes with an overlay.

    `weight_OI`: integers of storage.bits_of, or int8 codes and then `absmax_O`; the whole matrix. `overlay`:
    sorted flat positions, bits, and their dequantise.tile_begins. `reciprocal`, `least_absmax`: storage.py's.
    """

    weight_OI: Tensor
    dtype: torch.dtype
    absmax_O: Tensor | None = None
    overlay: tuple[Tensor, Tensor, Tensor] | None = None
    reciprocal: float = 0.0
    least_absmax: float = 0.0


def propose(
    gradient_RI: Tensor, below: Below, step: Tensor, first_row: int, row_R: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The gradient's square (0-d, float64); position, gradient and bits before of what would change.

    `gradient_RI`: float32 or bf16, of the rows from `first_row` on, or of `row_R`. `step`: lr * c, 0-d. The
    entries are ascending where the rows are. Syncs once.
    """
    gradient_RI = gradient_RI.contiguous()
    rows, width = gradient_RI.shape
    device, tile = gradient_RI.device, tile_of(width)
    grid = (rows, triton.cdiv(width, tile))
    tiles = grid[0] * grid[1]
    word_X = torch.empty(tiles * (tile // WORD.value), dtype=torch.int32, device=device)
    count_X = torch.empty(tiles, dtype=torch.int32, device=device)
    square_X = torch.empty(tiles, dtype=torch.float32, device=device)
    position_M, bits_M, begin_X = below.overlay or (word_X, word_X, count_X)  # unread where there is none
    absmax_O = square_X if below.absmax_O is None else below.absmax_O
    choices = {
        "FORMAT": FORMATS[below.dtype],
        "QUANTISED": below.absmax_O is not None,
        "HAS_ROWS": row_R is not None,
        "HAS_OVERLAY": below.overlay is not None,
        "BLOCK": tile,
        "enable_fp_fusion": False,
    }
    row_R = count_X if row_R is None else row_R.contiguous()
    _mark[grid](
        gradient_RI,
        row_R,
        below.weight_OI,
        absmax_O,
        step.float(),
        position_M,
        bits_M,
        begin_X,
        word_X,
        count_X,
        square_X,
        first_row,
        width,
        below.reciprocal,
        below.least_absmax,
        LANES=OVERLAID,
        **choices,
    )
    end_X = torch.cumsum(count_X, 0)
    kept = int(end_X[-1])
    small = below.weight_OI.numel() < 2**31  # four bytes less for every entry that waits
    position_N = torch.empty(kept, dtype=torch.int32 if small else torch.int64, device=device)
    gradient_N = torch.empty(kept, dtype=torch.float32, device=device)
    bits = torch.int32 if below.dtype == torch.float32 else torch.int16
    before_bits_N = torch.empty(kept, dtype=bits, device=device)
    if kept:
        _gather[grid](
            gradient_RI,
            row_R,
            below.weight_OI,
            absmax_O,
            position_M,
            bits_M,
            begin_X,
            word_X,
            torch.nn.functional.pad(end_X, (1, 0)),
            position_N,
            gradient_N,
            before_bits_N,
            first_row,
            width,
            below.reciprocal,
            **choices,
        )
    return square_X.double().sum(), (position_N, gradient_N, before_bits_N)
