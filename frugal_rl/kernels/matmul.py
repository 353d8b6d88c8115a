"""Products of a few tokens with an int8 matrix and the patch over it, without a dequantised copy.

With codes [O, I], absmax [O] and the policy's changed entries P (storage.py: Quantised, Overlay),

    y[m, o] = sum_i x[m, i] w[o, i] + bias[o],   w = bf16( code * absmax * float32(1 / 127) ),
              but the policy's bits where (o, i) is in P;

products of bf16 are exact in float32 and summed in float32: these are the numbers of a bf16 product with
the dequantised policy, in another order. A program makes BLOCK_O rows of y for all tokens: it streams its
rows of codes, rounds them to w in registers and multiplies them by tensor cores with x, held transposed so
that the weights are the operand that may stay in registers.

The patch. An entry adds x[m, i] * d, d = policy - base. It takes 5 bytes: the column and the bits of bf16(d)
in 32 bits, and the row's place in its block; sorted, with a pointer to each SPAN rows; made when the patch
has changed, never per token. Where d is no bf16 number there are two entries, -base and policy: exact in
any case. CHUNK_N entries at a time are one more step of the same product: the one-hot matrix [BLOCK_O, N]
with d in each entry's row, times the N gathered rows of x^T. The cost follows the count of entries, however
many of them lie in one row. Half of the programs do it first, half last, so that the codes keep streaming.

Few rows. Where O / BLOCK_O programs cannot fill the device, several share a block of rows, each with a part
of I; each writes its partial sums, and the one that comes last adds all of them in the order of the parts
and puts the block's counter back to 0. Which one it is changes no bit: equal inputs give equal bits.

Configurations come from `choose`, a function of the shape, not from triton.autotune: it would run trial
launches inside a CUDA graph's capture, and make the order of sums, and so the bits, depend on a race.
Everything is allocated by torch's allocator, so it may be captured; counters and the packed patch are made
before, and must live as long as the graph.

Differs from the usual weight-only kernel (torchao, bitsandbytes), which scales in the epilogue: its weights
are not rounded to bf16, so the sampler would have other weights than the learner. Two multiplications
a weight are the price. The addition by the last program is that of stream-K, arXiv 2301.03598, without its
spinning.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .choice import interpreted

RECIPROCAL = tl.constexpr(7.874015748698502e-3)  # 1 / 127, as storage.py has it
MOST_BLOCK_M = 128
MOST_TOKENS = 2 * MOST_BLOCK_M  # read twice; above, dequantising once (five bytes an entry) is cheaper
WIDEST = 1 << 16  # columns that an entry of the packed patch can name
CHUNK_N = 64  # entries of the patch a step
SPAN = 64  # rows between two pointers into the patch; block_o is a multiple
FEW_TOKENS = 4  # so few are gathered from x itself: no transposed copy is worth its launch
LEAST_STEPS = 4  # of BLOCK_I that a part of I has: fewer, and filling the pipeline is all it does
MOST_PARTS = 16
PROGRAMS_PER_SM = 2  # that are resident at once, by shared memory on 8.6 to 12.0


@dataclass(frozen=True)
class Config:
    """How one product is cut up. `block_m`: tokens, padded; `parts`: programs that share a block of rows.

    `registers`: at most so many a thread, so that two programs are resident; None: as the compiler likes.
    """

    block_m: int
    block_o: int
    block_i: int
    warps: int
    stages: int
    registers: int | None
    parts: int


def choose(tokens: int, rows: int, width: int, processors: int) -> Config:
    """The configuration for y [tokens, rows] = x [tokens, width] W^T on so many multiprocessors.

    A stage holds block_o * block_i bytes of codes and twice block_m * block_i of x: 12 to 24 KiB. All but
    one of the stages are on their way at a time, in 48 KiB, so that two programs fit into the 100 KiB of a
    consumer GPU's multiprocessor; latency (0.7 us) times bandwidth is 5 to 8 KiB there and 25 on an H200.
    More tokens want more rows a program: x is read from the L2 cache once a block of rows,
    2 block_m / block_o bytes for each of the codes. Not tuned on a GPU: tools/bench_kernels.py --sweep does.
    """
    block_m = max(16, triton.next_power_of_2(tokens))
    block_o, block_i, warps, stages, registers = {
        16: (64, 128, 4, 5, None),
        32: (64, 128, 4, 4, None),
        64: (128, 64, 8, 4, 128),
        128: (128, 64, 8, 3, None),
    }[block_m]
    steps, blocks = triton.cdiv(width, block_i), triton.cdiv(rows, block_o)
    parts = max(1, min(PROGRAMS_PER_SM * processors // blocks, steps // LEAST_STEPS, MOST_PARTS))
    parts = triton.cdiv(steps, triton.cdiv(steps, parts))  # none is left without a step
    return Config(block_m, block_o, block_i, warps, stages, registers, parts)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; the interpreter is given few, so that small matrices are shared too."""
    if device.type != "cuda":
        return 8
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


# --- the patch


@dataclass(frozen=True)
class Entries:
    """A packed patch: rows [SPAN r, SPAN (r + 1)) have the entries [start[r], start[r + 1]).

    entry_N int32, bits of bf16 above the column; row_N uint8, the row modulo 256; start_R int32.
    """

    start_R: Tensor
    entry_N: Tensor
    row_N: Tensor

    @property
    def nbytes(self) -> int:
        return self.start_R.nbytes + self.entry_N.nbytes + self.row_N.nbytes


def pack(position_N: Tensor, base_N: Tensor, policy_N: Tensor, rows: int, width: int) -> Entries | None:
    """Changed entries in the kernel's form; None: there are none. Syncs.

    position_N: sorted flat positions in a matrix [rows, width]; base_N and policy_N bf16 values there.
    """
    if not len(position_N):
        return None
    assert width <= WIDEST, "a column has 16 bits"
    delta_N = (policy_N.float() - base_N.float()).to(torch.bfloat16)
    # in float64 the sum is exact, so equality says that one bf16 number does it
    exact_N = base_N.double() + delta_N.double() == policy_N.double()
    count_N = 2 - exact_N.int()
    index_E = torch.repeat_interleave(count_N)
    first_E = torch.ones_like(index_E, dtype=torch.bool)
    first_E[1:] = index_E[1:] != index_E[:-1]
    pair_E = torch.where(first_E, -base_N[index_E], policy_N[index_E])
    value_E = torch.where(exact_N[index_E], delta_N[index_E], pair_E)
    position_E = position_N[index_E]
    span_R = torch.arange(triton.cdiv(rows, SPAN) + 1, device=position_N.device)
    start_R = torch.searchsorted(position_E, span_R * (SPAN * width)).int()
    column_E = (position_E % width).int()
    entry_E = (value_E.view(torch.int16).int() << 16) | column_E
    return Entries(start_R, entry_E, (position_E // width % 256).to(torch.uint8))


# --- the kernels


@triton.jit
def _rounded(value, INTERPRETED: tl.constexpr):
    """To bf16. The interpreter truncates and cannot multiply bf16: there, the rounded number in float32."""
    if INTERPRETED:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    return value.to(tl.bfloat16)


@triton.jit
def _add_entries(
    acc,
    start,
    entry,
    row,
    gathered,
    column_stride,
    token_stride,
    block,
    part,
    tokens,
    spans,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    SPAN: tl.constexpr,
    CHUNK: tl.constexpr,
    PADDED: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Every PARTS-th chunk of the entries of a block of rows, added to acc [BLOCK_O, BLOCK_M]."""
    o = tl.arange(0, BLOCK_O)
    m = tl.arange(0, BLOCK_M)
    low = tl.load(start + block * (BLOCK_O // SPAN))
    high = tl.load(start + tl.minimum((block + 1) * (BLOCK_O // SPAN), spans))
    for first in tl.range(low + part * CHUNK, high, PARTS * CHUNK, num_stages=STAGES):
        n = first + tl.arange(0, CHUNK)
        packed = tl.load(entry + n, mask=n < high, other=0)
        delta = (packed & -65536).to(tl.float32, bitcast=True)
        row_in_block = tl.load(row + n, mask=n < high, other=0).to(tl.int32) % BLOCK_O
        one_hot = tl.where(row_in_block[None, :] == o[:, None], delta[None, :], 0.0)
        one_hot = _rounded(one_hot, INTERPRETED)
        place = (packed & 65535)[:, None] * column_stride + m[None, :] * token_stride
        if PADDED:
            x = tl.load(gathered + place)
        else:
            x = tl.load(gathered + place, mask=(m < tokens)[None, :], other=0.0)
        if INTERPRETED:
            x = x.to(tl.float32)
        acc = tl.dot(one_hot, x, acc)
    return acc


@triton.jit(do_not_specialize=["tokens"])
def _product(
    x,
    code,
    absmax,
    bias,
    start,
    entry,
    row,
    gathered,
    column_stride,
    token_stride,
    out,
    partial,
    arrived,
    tokens,
    rows,
    width,
    PARTS: tl.constexpr,
    PATCHED: tl.constexpr,
    PADDED: tl.constexpr,
    BIASED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    SPAN: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    block = tl.program_id(0)
    part = tl.program_id(1)
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    m = tl.arange(0, BLOCK_M)
    held = o < rows
    scale = tl.load(absmax + o, mask=held, other=0.0)
    acc = tl.zeros((BLOCK_O, BLOCK_M), dtype=tl.float32)
    patch_first = (block + part) % 2 == 0
    if PATCHED:  # noqa: SIM102 (constexpr)
        if patch_first:
            acc = _add_entries(
                acc, start, entry, row, gathered, column_stride, token_stride, block, part, tokens,
                tl.cdiv(rows, SPAN), PARTS, BLOCK_M, BLOCK_O, SPAN, CHUNK, PADDED, STAGES, INTERPRETED,
            )  # fmt: skip
    steps = tl.cdiv(width, BLOCK_I)
    share = tl.cdiv(steps, PARTS)
    below = tl.where(held, tl.arange(0, BLOCK_O), 0)  # rows beyond the last read the block's first
    first_code = code + (block * BLOCK_O).to(tl.int64) * width
    for step in tl.range(part * share, tl.minimum(part * share + share, steps), num_stages=STAGES):
        i = step * BLOCK_I + tl.arange(0, BLOCK_I)
        code_at = first_code + below[:, None] * width + i[None, :]
        x_at = x + m[None, :] * width + i[:, None]
        if EVEN:
            w = tl.load(code_at)
            x_IM = tl.load(x_at, mask=(m < tokens)[None, :], other=0.0)
        else:
            w = tl.load(code_at, mask=(i < width)[None, :], other=0)
            x_IM = tl.load(x_at, mask=(m < tokens)[None, :] & (i < width)[:, None], other=0.0)
        if INTERPRETED:
            x_IM = x_IM.to(tl.float32)
        w = _rounded(w.to(tl.float32) * scale[:, None] * RECIPROCAL, INTERPRETED)
        acc = tl.dot(w, x_IM, acc)
    if PATCHED:  # noqa: SIM102 (constexpr)
        if not patch_first:
            acc = _add_entries(
                acc, start, entry, row, gathered, column_stride, token_stride, block, part, tokens,
                tl.cdiv(rows, SPAN), PARTS, BLOCK_M, BLOCK_O, SPAN, CHUNK, PADDED, STAGES, INTERPRETED,
            )  # fmt: skip
    last = True
    if PARTS > 1:
        size = BLOCK_O * BLOCK_M
        own = tl.arange(0, BLOCK_O)[:, None] * BLOCK_M + m[None, :]
        here = partial + block.to(tl.int64) * PARTS * size + own
        tl.store(here + part * size, acc)
        tl.debug_barrier()  # the program's sums are written before one of its threads says so
        last = tl.atomic_add(arrived + block, 1, sem="acq_rel", scope="gpu") == PARTS - 1
        if last:
            tl.debug_barrier()
            acc = tl.zeros((BLOCK_O, BLOCK_M), dtype=tl.float32)
            for other in range(PARTS):
                acc += tl.load(here + other * size, cache_modifier=".cg")
            tl.store(arrived + block, 0)
    if last:
        if BIASED:
            acc += tl.load(bias + o, mask=held, other=0.0).to(tl.float32)[:, None]
        tl.store(
            out + m[None, :] * rows + o[:, None],
            acc.to(out.dtype.element_ty),
            mask=held[:, None] & (m < tokens)[None, :],
        )


@triton.jit(do_not_specialize=["tokens"])
def _transpose(x, out, tokens, width, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr):
    """out [width, BLOCK_M] = x [tokens, width]^T, 0 beyond the tokens."""
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    m = tl.arange(0, BLOCK_M)
    inside = (i < width)[None, :]
    value = tl.load(x + m[:, None] * width + i[None, :], mask=(m < tokens)[:, None] & inside, other=0.0)
    tl.store(out + i[:, None] * BLOCK_M + m[None, :], tl.trans(value), mask=(i < width)[:, None])


def transposed(x_MI: Tensor) -> Tensor:
    """x^T [I, padded M], padded with zeros."""
    tokens, width = x_MI.shape
    block_m, block_i = max(16, triton.next_power_of_2(tokens)), 64
    out = torch.empty(width, block_m, dtype=x_MI.dtype, device=x_MI.device)
    _transpose[(triton.cdiv(width, block_i),)](
        x_MI, out, tokens, width, block_m, block_i, num_warps=4, enable_fp_fusion=True
    )
    return out


class Inputs:
    """x^T of the last x: matrices that read the same input share it."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, Tensor] | None = None

    def transposed(self, x: Tensor) -> Tensor:
        """Of x [..., I]; made anew if x is another tensor than last time, or has been written to."""
        if self._last is None or self._last[0] is not x or self._last[1] != x._version:
            self._last = x, x._version, transposed(x.reshape(-1, x.shape[-1]).contiguous())
        return self._last[2]

    def forget(self) -> None:
        """Hold no tensor."""
        self._last = None


def fits(code_OI: Tensor, base: torch.dtype, compute: torch.dtype) -> bool:
    """Whether the kernel multiplies them: values and x in bf16 (x float32 in the interpreter)."""
    wanted = torch.float32 if interpreted() else torch.bfloat16
    return base == torch.bfloat16 and compute == wanted and code_OI.shape[1] <= WIDEST


class Matrix:
    """An int8 matrix and the patch over it, as the kernel reads them: the tensors themselves, no copies.

    `changed`: sorted flat positions, and the base's and the policy's values there (see pack). Its tensors
    must not change while it is used.
    """

    def __init__(
        self, code_OI: Tensor, absmax_O: Tensor, changed: tuple[Tensor, Tensor, Tensor], inputs: Inputs
    ) -> None:
        self.code_OI, self.absmax_O, self.inputs = code_OI, absmax_O, inputs
        self.entries = pack(*changed, *code_OI.shape)
        blocks = triton.cdiv(len(code_OI), SPAN)
        self.arrived = torch.zeros(blocks, dtype=torch.int32, device=code_OI.device)

    def product(
        self,
        x: Tensor,
        bias_O: Tensor | None = None,
        dtype: torch.dtype | None = None,
        config: Config | None = None,
    ) -> Tensor:
        """x W^T + bias in `dtype`, x's own unless given. Shapes: x [..., I]. No sync."""
        rows, width = self.code_OI.shape
        x_MI = x.reshape(-1, width).contiguous()
        tokens = len(x_MI)
        if tokens > MOST_BLOCK_M:
            parts = [self.product(part_MI, bias_O, dtype, config) for part_MI in x_MI.split(MOST_BLOCK_M)]
            return torch.cat(parts).view(*x.shape[:-1], rows)
        config = config or choose(tokens, rows, width, processors(x.device))
        out = torch.empty(tokens, rows, dtype=dtype or x.dtype, device=x.device)
        blocks = triton.cdiv(rows, config.block_o)
        partial = out
        if config.parts > 1:
            size = blocks * config.parts * config.block_o * config.block_m
            partial = torch.empty(size, dtype=torch.float32, device=x.device)
        few = tokens <= FEW_TOKENS
        start = entry = row = self.arrived
        gathered, column_stride, token_stride = x_MI, 1, width
        if self.entries is not None:
            start, entry, row = self.entries.start_R, self.entries.entry_N, self.entries.row_N
            if not few:
                gathered, column_stride, token_stride = self.inputs.transposed(x), config.block_m, 1
        _product[(blocks, config.parts)](
            x_MI,
            self.code_OI,
            self.absmax_O,
            out if bias_O is None else bias_O,
            start,
            entry,
            row,
            gathered,
            column_stride,
            token_stride,
            out,
            partial,
            self.arrived,
            tokens,
            rows,
            width,
            PARTS=config.parts,
            PATCHED=self.entries is not None,
            PADDED=not few,
            BIASED=bias_O is not None,
            EVEN=width % config.block_i == 0,
            BLOCK_M=config.block_m,
            BLOCK_O=config.block_o,
            BLOCK_I=config.block_i,
            SPAN=SPAN,
            CHUNK=CHUNK_N,
            STAGES=config.stages,
            INTERPRETED=interpreted(),
            num_warps=config.warps,
            num_stages=config.stages,
            maxnreg=config.registers,
            enable_fp_fusion=True,
        )
        return out.view(*x.shape[:-1], rows)
