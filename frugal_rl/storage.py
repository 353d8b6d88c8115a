"""How one tensor of the policy is held: whole (`Plain`), in one byte an entry (`Quantised`), or not on the
device at all (`Streamed`).

All are read in any compute format, changed entry by entry, and lead back to their base. What the tensor
itself does not hold of {base, policy} is its overlay, sorted positions with bits:

                   the tensor                              the overlay
    Plain          the policy, in the checkpoint's format  the base's bits of changed entries
    Whole          the policy, in the checkpoint's format  none: its base is read from the checkpoint
    Quantised      the base, frozen: codes and scales      the policy's bits of changed entries
    Streamed       the base, in the checkpoint's file      the policy's bits of changed entries, the base's

A streamed matrix may have a quantised twin for the sampler, which shares its overlay: the sampler reads
bf16(code * scale) where nothing has changed, and the learner's very bits where something has.

A quantised matrix has an int8 code for each entry and a float32 absmax for each row. Its base is

    base = bf16( code * absmax * float32(1 / 127) ),   code = round( w * (127 / absmax) ),

a function of the checkpoint alone; the policy is the base with the overlay's bits laid over it.

Update rule. With exact = float32(w) - step * float32(g), step = lr * c, an entry becomes

    w' = round_to_format( exact )                        Plain, Streamed, and Quantised where code != 0
    w' = exact rounded to a multiple of u if |exact| < 128 u,                Quantised where code == 0
         else bf16( exact ),   u = ulp_bf16( s / 4 ), s = absmax / 127 the row's quantisation step

Next to 0 every number has a bf16 of its own, so every entry whose code is 0 would change at every step;
the grid is that of a weight of a quarter of the step. Above 128 u bf16's own grid is u or coarser: the
two meet, so the rule is monotonic in `exact`, and clipping stays exact (weights.py). A result of 0 is +0.
A row of zeros has no step: it rounds as bf16 does.

Source: the quantiser's numbers are bitsandbytes' int8_vectorwise_quant and int8_vectorwise_dequant.
Differs: written out here, because there the CUDA kernel takes fp16 only, a row of zeros divides by 0, and
the import takes seconds; a test holds the two to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .kernels.choice import use_triton
from .stream import Source

if TYPE_CHECKING:
    from .kernels.propose import Below

INTEGERS = {2: torch.int16, 4: torch.int32}
RECIPROCAL = 7.874015748698502e-3  # 1 / 127, as bitsandbytes writes it
BLOCK = 1 << 20  # entries that are quantised or dequantised at a time: 4 MiB in float32
LAID = 1 << 20  # entries that are laid over rows at a time: a few copies of 8 MiB
SMALLEST_ABSMAX = 1e-30  # stands for 0 where it would be divided by

Rows = slice | Tensor
Coarse = tuple[Tensor, Tensor]  # flat indices, and the unit u at each


def bits_of(tensor: Tensor) -> Tensor:
    """The same storage read as signed integers of the same width, flat."""
    return tensor.view(INTEGERS[tensor.element_size()]).view(-1)


@dataclass(frozen=True)
class Changed:
    """Entries of one tensor that a step changed: sorted flat positions, bits before and after."""

    position_N: Tensor
    before_bits_N: Tensor
    after_bits_N: Tensor


@dataclass
class Overlay:
    """Sorted flat positions, and bits that the tensor below does not hold (see the module's table)."""

    position_N: Tensor
    bits_N: Tensor
    _tile_begin_X: Tensor | None = field(default=None, init=False, repr=False)  # of these positions (tiled)
    # what the host has asked the device about the positions, until there are others
    _asked_of: Tensor | None = field(default=None, init=False, repr=False)
    _answers: dict[tuple[int, ...], tuple[int, int]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def empty(cls, like: Tensor) -> Overlay:
        """For entries of the dtype and on the device of `like`."""
        position_N = torch.zeros(0, dtype=torch.int64, device=like.device)
        return cls(position_N, torch.zeros(0, dtype=INTEGERS[like.element_size()], device=like.device))

    def __len__(self) -> int:
        return len(self.position_N)

    @property
    def nbytes(self) -> int:
        return self.position_N.nbytes + self.bits_N.nbytes

    def find(self, position_M: Tensor) -> tuple[Tensor, Tensor]:
        """For each position its slot here, and whether it is there at all."""
        if not len(self):
            return torch.zeros_like(position_M), torch.zeros_like(position_M, dtype=torch.bool)
        slot_M = torch.searchsorted(self.position_N, position_M).clamp_(max=len(self) - 1)
        return slot_M, self.position_N[slot_M] == position_M

    def _known(self) -> dict[tuple[int, ...], tuple[int, int]]:
        """What the device has been asked about the present positions."""
        if self._asked_of is not self.position_N:
            self._asked_of, self._answers = self.position_N, {}
        return self._answers

    def between(self, start: int, stop: int) -> slice:
        """Slots here of the flat positions [start, stop). Syncs when first asked since a change."""
        answers, key = self._known(), (start, stop)
        if key not in answers:
            ends = torch.tensor(key, device=self.position_N.device)
            low, high = torch.searchsorted(self.position_N, ends).tolist()
            answers[key] = low, high
        return slice(*answers[key])

    def most_in_a_row(self, width: int) -> int:
        """The most entries in any row of a matrix. Syncs as `between`."""
        answers, key = self._known(), (width,)
        if key not in answers:
            answers[key] = int(torch.bincount(self.position_N // width).max()) if len(self) else 0, 0
        return answers[key][0]

    def tiled(self, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor] | None:
        """Positions, bits, and where a kernel finds those of each tile of a matrix of that shape.

        None if there are none. Found once for all uses of these positions.
        """
        from .kernels.dequantise import tile_begins

        if not len(self):
            return None
        if self._tile_begin_X is None:
            self._tile_begin_X = tile_begins(self.position_N, *shape)
        return self.position_N, self.bits_N, self._tile_begin_X

    def lay_on_(self, out: Tensor, dtype: torch.dtype, rows: Rows | None = None) -> Tensor:
        """Write the entries, which are of `dtype`, into those rows of a matrix, or the whole. In place.

        `rows`: a slice, or row numbers [R]; no shape depends on these. Syncs when first asked since a change.
        """
        if not len(self):
            return out
        if rows is None:
            out.view(-1)[self.position_N] = self.bits_N.view(dtype).to(out.dtype)
        elif isinstance(rows, slice):
            width = out.shape[-1]
            here = self.between(rows.start * width, rows.stop * width)
            index_N = self.position_N[here] - rows.start * width
            out.view(-1)[index_N] = self.bits_N[here].view(dtype).to(out.dtype)
        else:
            most = self.most_in_a_row(out.shape[-1])
            step = max(1, LAID // most)
            for start in range(0, len(rows), step):
                self._lay_on_some_(out[start : start + step], dtype, rows[start : start + step], most)
        return out

    def _lay_on_some_(self, out_RI: Tensor, dtype: torch.dtype, row_R: Tensor, most: int) -> None:
        """As many entries for every row as the fullest has: a shorter row's own first one again and again."""
        width = out_RI.shape[1]
        first_R1 = (row_R * width)[:, None]
        low_R1 = torch.searchsorted(self.position_N, first_R1)
        slot_RM = (low_R1 + torch.arange(most, device=row_R.device)).clamp_(max=len(self) - 1)
        inside_RM = (self.position_N[slot_RM] - first_R1 < width) & (slot_RM >= low_R1)
        slot_RM = torch.where(inside_RM, slot_RM, slot_RM[:, :1])
        # a row that has none keeps what is in its first column
        any_R1 = inside_RM[:, :1]
        column_RM = torch.where(any_R1, self.position_N[slot_RM] - first_R1, 0)
        value_RM = self.bits_N[slot_RM].view(dtype).to(out_RI.dtype)
        out_RI.scatter_(1, column_RM, torch.where(any_R1, value_RM, out_RI[:, :1]))

    def put_(self, position_M: Tensor, bits_M: Tensor, *, overwrite: bool) -> None:
        """Add entries, sorted; those already there keep their bits unless `overwrite`."""
        slot_M, found_M = self.find(position_M)
        if overwrite:
            self.bits_N[slot_M[found_M]] = bits_M[found_M]
        position_N = torch.cat([self.position_N, position_M[~found_M]])
        self.position_N, order_N = torch.sort(position_N)
        self.bits_N = torch.cat([self.bits_N, bits_M[~found_M]])[order_N]
        self._tile_begin_X = None


def rounded(before: Tensor, gradient: Tensor, step: Tensor, coarse: Coarse | None) -> Tensor:
    """w' of the update rule. `step` is lr * c, a 0-d tensor; `coarse`: where the grid is not the format's."""
    exact = before.float() - step.float() * gradient.float()
    after = exact.to(before.dtype)
    if coarse is not None:
        index_M, unit_M = coarse
        exact_M = exact.view(-1)[index_M]
        on_grid_M = torch.round(exact_M / unit_M) * unit_M + 0.0  # -0 + 0 is +0
        small_M = exact_M.abs() < 128 * unit_M
        after.view(-1)[index_M] = torch.where(small_M, on_grid_M.to(after.dtype), after.view(-1)[index_M])
    return after


class Plain:
    """A tensor in the checkpoint's format, changed in place."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.overlay = Overlay.empty(tensor)

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def whole(self, dtype: torch.dtype) -> Tensor | None:
        """The storage itself if it is of that format."""
        return self.tensor if self.tensor.dtype == dtype else None

    def copy_to_(self, out: Tensor) -> Tensor:
        return out.copy_(self.tensor)

    def rows(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Those rows; `rows` is a slice, or row numbers of any shape."""
        return self.tensor[rows].to(dtype)

    def at(self, position_N: Tensor) -> Tensor:
        """Entries by flat position."""
        return self.tensor.view(-1)[position_N]

    def under(self) -> Below | None:
        """All of it as the kernel that proposes reads it; None if it is not on the device."""
        from .kernels.propose import Below

        return Below(bits_of(self.tensor).view(self.shape), self.dtype)

    def coarse(self, rows: Rows) -> Coarse | None:
        """Where among those rows the update rule has a coarser grid than the format's."""
        return None

    def coarse_at(self, position_N: Tensor) -> Coarse | None:
        return None

    def write_(self, entries: Changed) -> None:
        bits_of(self.tensor)[entries.position_N] = entries.after_bits_N
        self.overlay.put_(entries.position_N, entries.before_bits_N, overwrite=False)

    def difference(self) -> Changed:
        """From the base to the policy, over all entries that any step has changed."""
        position_N = self.overlay.position_N
        return Changed(position_N, self.overlay.bits_N, bits_of(self.tensor)[position_N])

    def take_off_(self) -> Overlay:
        """Be the base; `put_back_` with what this returns makes it the policy again."""
        position_N = self.overlay.position_N
        policy = Overlay(position_N, bits_of(self.tensor)[position_N])
        bits_of(self.tensor)[position_N] = self.overlay.bits_N
        return policy

    def put_back_(self, policy: Overlay) -> None:
        bits_of(self.tensor)[policy.position_N] = policy.bits_N


class Whole(Plain):
    """As Plain, where a step may change every entry: its base stays in the checkpoint, and nothing over it.

    An overlay would take ten bytes an entry, five times the tensor. The difference is made when asked for.
    """

    def __init__(self, tensor: Tensor, source: Source) -> None:
        super().__init__(tensor)
        self.source = source

    def write_(self, entries: Changed) -> None:
        bits_of(self.tensor)[entries.position_N] = entries.after_bits_N

    def difference(self) -> Changed:
        """As Plain.difference, over the entries that differ now. Reads the checkpoint."""
        bits_N = bits_of(self.tensor)
        found = []
        for start in range(0, len(bits_N), BLOCK):
            here_N = bits_N[start : start + BLOCK]
            base = torch.empty(len(here_N), dtype=self.dtype, device=self.tensor.device)
            base_N = bits_of(self.source.copy_to_(base, start))
            index_N = torch.nonzero(here_N != base_N).view(-1)
            found.append(Changed(index_N + start, base_N[index_N], here_N[index_N]))
        return Changed(
            torch.cat([c.position_N for c in found]),
            torch.cat([c.before_bits_N for c in found]),
            torch.cat([c.after_bits_N for c in found]),
        )

    def take_off_(self) -> Overlay:
        entries = self.difference()
        bits_of(self.tensor)[entries.position_N] = entries.before_bits_N
        return Overlay(entries.position_N, entries.after_bits_N)


class Quantised:
    """A matrix as frozen codes [O, I] and a scale a row; the policy's changed entries lie over it.

    `dtype` is that of a value: bf16, but the checkpoint's own for the twin of a streamed matrix.
    """

    def __init__(self, code_OI: Tensor, absmax_O: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
        self.code_OI, self.absmax_O, self.dtype = code_OI, absmax_O, dtype
        self.shape = code_OI.shape
        self.overlay = Overlay.empty(torch.empty(0, dtype=self.dtype, device=code_OI.device))

    @classmethod
    def empty(
        cls, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.bfloat16
    ) -> Quantised:
        code_OI = torch.empty(shape, dtype=torch.int8, device=device)
        return cls(code_OI, torch.empty(shape[0], dtype=torch.float32, device=device), dtype)

    @classmethod
    def of(cls, weight_OI: Tensor) -> Quantised:
        made = cls.empty(tuple(weight_OI.shape), weight_OI.device)
        made.quantise_rows_(0, weight_OI)
        return made

    def quantise_rows_(self, first_row: int, weight_RI: Tensor) -> None:
        """Set the codes and scales of rows from `first_row` on."""
        for start, stop in self._blocks(len(weight_RI)):
            here = slice(first_row + start, first_row + stop)
            part_RI = weight_RI[start:stop].to(self.code_OI.device).float()
            absmax_R = part_RI.abs().amax(1)
            self.absmax_O[here] = absmax_R
            factor_R = 127.0 / absmax_R.clamp(min=SMALLEST_ABSMAX)
            self.code_OI[here] = torch.round(part_RI * factor_R[:, None]).to(torch.int8)

    def _blocks(self, rows: int) -> list[tuple[int, int]]:
        step = max(1, BLOCK // self.shape[1])
        return [(a, min(a + step, rows)) for a in range(0, rows, step)]

    @property
    def nbytes(self) -> int:
        """Of codes, scales and the overlay."""
        return self.code_OI.nbytes + self.absmax_O.nbytes + self.overlay.nbytes

    def whole(self, dtype: torch.dtype) -> Tensor | None:
        return None

    def _dequantise_to_(self, out_RI: Tensor, code_RI: Tensor, absmax_R: Tensor) -> Tensor:
        """The base's values of the same rows, block by block."""
        for start, stop in self._blocks(len(code_RI)):
            value_BI = code_RI[start:stop] * absmax_R[start:stop, None]
            out_RI[start:stop] = value_BI.mul_(RECIPROCAL).to(self.dtype)
        return out_RI

    def copy_to_(self, out: Tensor) -> Tensor:
        """The whole policy's matrix. In place."""
        return self._copy_rows_to_(out, slice(0, self.shape[0]))

    def _copy_rows_to_(self, out_RI: Tensor, rows: slice) -> Tensor:
        """The policy's rows. In place."""
        if use_triton(self.code_OI.device):
            from .kernels.dequantise import dequantise_

            assert out_RI.is_contiguous()
            dequantise_(
                bits_of(out_RI).view(out_RI.shape),
                self.code_OI,
                self.absmax_O,
                self.overlay.tiled(self.shape),
                rows.start,
                RECIPROCAL,
                self.dtype,
                out_RI.dtype,
            )
            return out_RI
        self._dequantise_to_(out_RI, self.code_OI[rows], self.absmax_O[rows])
        whole = rows == slice(0, self.shape[0])
        return self.overlay.lay_on_(out_RI, self.dtype, None if whole else rows)

    def rows(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """As Plain.rows. Syncs as Overlay.lay_on_, but for a slice where a kernel does it."""
        if isinstance(rows, slice):
            rows = slice(*rows.indices(self.shape[0])[:2])
            shape = rows.stop - rows.start, self.shape[1]
            out_RI = torch.empty(shape, dtype=dtype, device=self.code_OI.device)
            return self._copy_rows_to_(out_RI, rows)
        row_R = rows.reshape(-1)
        out_RI = torch.empty(len(row_R), self.shape[1], dtype=dtype, device=self.code_OI.device)
        self._dequantise_to_(out_RI, self.code_OI[row_R], self.absmax_O[row_R])
        return self.overlay.lay_on_(out_RI, self.dtype, row_R).view(*rows.shape, -1)

    def _base_at(self, position_N: Tensor) -> Tensor:
        code_N = self.code_OI.view(-1)[position_N]
        return (code_N * self.absmax_O[position_N // self.shape[1]]).mul_(RECIPROCAL).to(self.dtype)

    def at(self, position_N: Tensor) -> Tensor:
        """Entries by flat position."""
        value_N = self._base_at(position_N)
        slot_N, found_N = self.overlay.find(position_N)
        value_N[found_N] = self.overlay.bits_N[slot_N[found_N]].view(self.dtype)
        return value_N

    def under(self) -> Below | None:
        """As Plain.under."""
        from .kernels.propose import Below

        laid = self.overlay.tiled(self.shape)
        return Below(self.code_OI, self.dtype, self.absmax_O, laid, RECIPROCAL, SMALLEST_ABSMAX)

    def _units(self, row_N: Tensor) -> Tensor:
        """u of those rows: 2 ** (floor(log2(s / 4)) - 7)."""
        step_N = self.absmax_O[row_N].clamp(min=SMALLEST_ABSMAX) * RECIPROCAL
        power_N = (step_N.view(torch.int32) & 0x7F800000).view(torch.float32)  # the exponent without the rest
        return power_N * 2.0**-9

    def coarse(self, rows: Rows) -> Coarse | None:
        """Where among those rows the code is 0."""
        row_N, column_N = torch.nonzero(self.code_OI[rows] == 0, as_tuple=True)
        index_N = row_N * self.shape[1] + column_N
        return index_N, self._units(row_N + rows.start if isinstance(rows, slice) else rows[row_N])

    def coarse_at(self, position_N: Tensor) -> Coarse | None:
        index_M = torch.nonzero(self.code_OI.view(-1)[position_N] == 0).view(-1)
        return index_M, self._units(position_N[index_M] // self.shape[1])

    def write_(self, entries: Changed) -> None:
        self.overlay.put_(entries.position_N, entries.after_bits_N, overwrite=True)

    def difference(self) -> Changed:
        """As Plain.difference."""
        position_N = self.overlay.position_N
        return Changed(position_N, bits_of(self._base_at(position_N)), self.overlay.bits_N)

    def take_off_(self) -> Overlay:
        """As Plain.take_off_."""
        policy = self.overlay
        self.overlay = Overlay(policy.position_N[:0], policy.bits_N[:0])
        return policy

    def put_back_(self, policy: Overlay) -> None:
        self.overlay = policy


class Streamed:
    """A matrix that stays in the checkpoint; `present` while its layer is on the device.

    Reading anything but the present layer goes through host memory, a block at a time.
    """

    def __init__(self, source: Source, device: torch.device, sampled: Quantised | None = None) -> None:
        self.source, self.device, self.sampled = source, device, sampled
        self.shape, self.dtype = source.shape, source.dtype
        self.present: Tensor | None = None  # the policy, whole, in the checkpoint's format
        like = torch.empty(0, dtype=self.dtype, device=device)
        self.overlay = sampled.overlay if sampled else Overlay.empty(like)
        self.below = Overlay.empty(like)  # the base's bits at the overlay's positions

    @property
    def nbytes(self) -> int:
        """On the device, between the layers' visits."""
        return (self.sampled.nbytes if self.sampled else self.overlay.nbytes) + self.below.bits_N.nbytes

    def arrive_(self, base: Tensor | None) -> None:
        """The base is on the device now, in memory that may be written to; None: it is not any more."""
        self.present = None if base is None else self.overlay.lay_on_(base, self.dtype)

    def whole(self, dtype: torch.dtype) -> Tensor | None:
        return self.present if self.dtype == dtype else None

    def copy_to_(self, out: Tensor) -> Tensor:
        """The whole policy's matrix. In place."""
        if self.present is not None:
            return out.copy_(self.present)
        return self.overlay.lay_on_(self.source.copy_to_(out), self.dtype)

    def rows(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """As Plain.rows. Syncs with the device."""
        if self.present is not None:
            return self.present[rows].to(dtype)
        if isinstance(rows, slice):
            out_RI = torch.empty((rows.stop - rows.start, *self.shape[1:]), dtype=dtype, device=self.device)
            self.source.copy_to_(out_RI, rows.start * math.prod(self.shape[1:]))
            return self.overlay.lay_on_(out_RI, self.dtype, rows)
        own_R, inverse = torch.unique(rows, return_inverse=True)
        out_RI = self.source.rows(own_R.cpu().numpy()).to(self.device, dtype)
        return self.overlay.lay_on_(out_RI, self.dtype, own_R)[inverse]

    def at(self, position_N: Tensor) -> Tensor:
        """Entries by flat position; for few (Source.bits)."""
        bits_N = torch.from_numpy(self.source.bits(position_N.cpu().numpy()).view(f"i{self.dtype.itemsize}"))
        value_N = bits_N.to(self.device).view(self.dtype)
        slot_N, found_N = self.overlay.find(position_N)
        value_N[found_N] = self.overlay.bits_N[slot_N[found_N]].view(self.dtype)
        return value_N

    def under(self) -> Below | None:
        """As Plain.under."""
        from .kernels.propose import Below

        return None if self.present is None else Below(bits_of(self.present).view(self.shape), self.dtype)

    def coarse(self, rows: Rows) -> Coarse | None:
        return None

    def coarse_at(self, position_N: Tensor) -> Coarse | None:
        return None

    def write_(self, entries: Changed) -> None:
        self.overlay.put_(entries.position_N, entries.after_bits_N, overwrite=True)
        self.below.put_(entries.position_N, entries.before_bits_N, overwrite=False)
        self.below.position_N = self.overlay.position_N  # the same: kept once

    def difference(self) -> Changed:
        """As Plain.difference."""
        return Changed(self.overlay.position_N, self.below.bits_N, self.overlay.bits_N)

    def take_off_(self) -> Overlay:
        """As Plain.take_off_."""
        policy = self.overlay
        self._lay_over(Overlay(policy.position_N[:0], policy.bits_N[:0]))
        return policy

    def put_back_(self, policy: Overlay) -> None:
        self._lay_over(policy)

    def _lay_over(self, overlay: Overlay) -> None:
        self.overlay = overlay
        if self.sampled:
            self.sampled.overlay = overlay


Held = Plain | Quantised | Streamed
