"""The policy's weights: the checkpoint's tensors, changed in place, and the patch that leads back.

Law: `policy = base + overlay`. The overlay keeps, for every entry that any step has changed, its flat
position and the base's bits; `base()` lays them back for as long as the reference policy is wanted,
and `patch()` is their difference to what is there now. Nothing else is stored: no second model, no
master copy, no optimizer state.

Update rule (plain SGD under the storage format's own rounding), for entry w with gradient g:

    w' = round_to_storage( float32(w) - (lr * c) * float32(g) ),   c = min(1, clip / (||g|| + 1e-6))

and the entry *changes* when w' has other bits than w. A step is a transaction (`Transaction`):

1. `propose` sees one tensor's gradient at a time, adds its square to the norm and keeps only the
   entries that would change at the largest scale still possible; the gradient can then be freed.
   The norm seen so far bounds c from above, the rounding is monotonic in c, and so no entry outside
   the proposal can change later: clipping by the global norm is exact without a second pass.
2. `commit` knows the whole norm, rounds the proposed entries at the true c and writes those that
   changed. A norm that is not finite commits nothing. Weights never change between the two.

Source: SGD for RLVR, arXiv 2602.07729 section 4 (no momentum, one step a rollout batch); the clip factor
is torch.nn.utils.clip_grad_norm_'s. Differs: the gradient is kept in float32 up to the rounding, where
torch.optim.SGD on a bf16 parameter would round the gradient to bf16 first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .errors import InputError
from .patch import AlreadyApplied, BaseInfo, Patch, TensorPatch, WrongBase

STORAGE = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in STORAGE.items()}
BITS = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}
MOVED = 1e-5  # the papers' threshold for "changed" (arXiv 2505.11711, 2602.07729)


def bits_of(tensor: Tensor) -> Tensor:
    """The same storage read as signed integers of the same width, flat."""
    return tensor.view(BITS[tensor.element_size()][0]).view(-1)


def unsigned(bits_N: Tensor) -> np.ndarray:
    """Bits on the host as numpy's unsigned integers, the form patches are made of."""
    return bits_N.cpu().numpy().view(BITS[bits_N.element_size()][1])


def signed(bits_N: np.ndarray, device: torch.device) -> Tensor:
    """Inverse of `unsigned`."""
    return torch.from_numpy(bits_N.view(f"i{bits_N.itemsize}").copy()).to(device)


@dataclass
class Overlay:
    """What was there before any step: sorted flat positions and the base's bits at them."""

    position_N: Tensor
    base_bits_N: Tensor

    def add_(self, position_M: Tensor, before_bits_M: Tensor) -> None:
        """Remember entries not seen before; `position_M` is sorted, `before_bits_M` what they held."""
        if len(self.position_N):
            slot_M = torch.searchsorted(self.position_N, position_M)
            found_M = self.position_N[slot_M.clamp(max=len(self.position_N) - 1)] == position_M
            position_M, before_bits_M = position_M[~found_M], before_bits_M[~found_M]
        position_N = torch.cat([self.position_N, position_M])
        self.position_N, order_N = torch.sort(position_N)
        self.base_bits_N = torch.cat([self.base_bits_N, before_bits_M])[order_N]


@dataclass(frozen=True)
class Changed:
    """Entries of one tensor that a step changed: sorted flat positions, bits before and after."""

    position_N: Tensor
    before_bits_N: Tensor
    after_bits_N: Tensor


@dataclass(frozen=True)
class Commit:
    """What a step did. `changed` is empty when it was dropped, and `dropped` says why."""

    norm: float
    scale: float
    changed: Mapping[str, Changed]
    dropped: str | None = None

    @property
    def entries(self) -> int:
        return sum(len(c.position_N) for c in self.changed.values())


class Weights:
    """All tensors of one checkpoint on one device, in the checkpoint's own format.

    `compute_dtype` is what `load` and `rows` return: float32 on a CPU (where bf16 arithmetic is many
    times slower), the storage format elsewhere.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        compute_dtype: torch.dtype | None = None,
        base: BaseInfo | None = None,
    ) -> None:
        self.tensors = dict(tensors)
        first = next(iter(self.tensors.values()))
        self.device = first.device
        self.storage_dtype = max((t.dtype for t in tensors.values()), key=lambda d: d.itemsize)
        if compute_dtype is None:
            compute_dtype = torch.float32 if self.device.type == "cpu" else self.storage_dtype
        self.compute_dtype = compute_dtype
        self.base_info = base
        self.overlay: dict[str, Overlay] = {}

    @classmethod
    def from_checkpoint(
        cls, folder: Path, device: torch.device, *, name: str, names: frozenset[str]
    ) -> Weights:
        """Load tensor by tensor. Peak: the final size and one tensor.

        `name`: what patches call the base. `names`: the tensors wanted (a checkpoint may hold a copy of
        a tied head). Raises InputError for a format that SGD cannot be exact on.
        """
        checkpoint = Checkpoint(folder)
        tensors = {}
        for key, info in checkpoint.tensors.items():
            if key not in names:
                continue
            if info.dtype not in STORAGE:
                raise InputError(
                    f"{folder}: {key} is {info.dtype}; weights are trained in "
                    f"{', '.join(STORAGE)}: take an unquantised checkpoint"
                )
            flat = torch.empty(math.prod(info.shape), dtype=STORAGE[info.dtype], device=device)
            bits = checkpoint.bits(key)
            bits_of(flat).copy_(torch.from_numpy(np.array(bits).view(f"i{bits.itemsize}")))
            tensors[key] = flat.view(info.shape)
        return cls(tensors, base=BaseInfo(name, checkpoint.fingerprints()))

    # --- reading

    @property
    def parameters(self) -> int:
        return sum(t.numel() for t in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def load(self, name: str, scratch: Tensor | None = None) -> Tensor:
        """The whole tensor in the compute format: a view where it is stored so, else a copy in `scratch`."""
        stored = self.tensors[name]
        if stored.dtype == self.compute_dtype:
            return stored
        if scratch is None:
            return stored.to(self.compute_dtype)
        return scratch[: stored.numel()].view(stored.shape).copy_(stored)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) in the compute format."""
        return self.tensors[name][start:stop].to(self.compute_dtype)

    def lookup(self, name: str, index_T: Tensor) -> Tensor:
        """Rows by index (an embedding) in the compute format."""
        return self.tensors[name][index_T].to(self.compute_dtype)

    # --- writing

    def write_(self, changed: Mapping[str, Changed]) -> None:
        """Lay a step over the weights and remember what was below. In place."""
        for name, entries in changed.items():
            bits_of(self.tensors[name])[entries.position_N] = entries.after_bits_N
            overlay = self.overlay.setdefault(name, self._empty(entries))
            overlay.add_(entries.position_N, entries.before_bits_N)

    @staticmethod
    def _empty(like: Changed) -> Overlay:
        return Overlay(like.position_N[:0], like.before_bits_N[:0])

    def write_patch_(self, patch: Patch) -> None:
        """Lay a patch over the weights (resume, evaluation of base + patch). In place.

        Raises PatchError before anything is written: WrongBase, AlreadyApplied, DamagedPatch.
        """
        missing = sorted(set(patch.tensors) - set(self.tensors))
        if missing:
            raise WrongBase(f"the patch changes {missing[0]}, which this model does not have", missing)
        before: dict[str, tuple[Tensor, Tensor]] = {}
        for name, delta in patch.tensors.items():
            stored = self.tensors[name]
            if (DTYPE_NAMES[stored.dtype], tuple(stored.shape)) != (delta.dtype, delta.shape):
                got = f"{DTYPE_NAMES[stored.dtype]} {list(stored.shape)}"
                raise WrongBase(
                    f"{name} is {got}, the patch is for {delta.dtype} {list(delta.shape)}", [name]
                )
            position_N = torch.from_numpy(np.array(delta.positions)).to(self.device)
            before[name] = position_N, bits_of(stored)[position_N]
        state = patch.state_of(lambda name: unsigned(before[name][1]), "the model")
        if patch.tensors and state == "applied":
            raise AlreadyApplied("the model holds this patch already")
        changed = {}
        for name, (position_N, bits_N) in before.items():
            after = patch.tensors[name].applied(unsigned(bits_N))
            changed[name] = Changed(position_N, bits_N, signed(after, self.device))
        self.write_(changed)

    # --- the patch

    @contextmanager
    def base(self) -> Iterator[None]:
        """The reference policy: the patch taken off in place, and put back at the end."""
        now = {n: bits_of(self.tensors[n])[o.position_N] for n, o in self.overlay.items()}
        for name, overlay in self.overlay.items():
            bits_of(self.tensors[name])[overlay.position_N] = overlay.base_bits_N
        try:
            yield
        finally:
            for name, bits_N in now.items():
                bits_of(self.tensors[name])[self.overlay[name].position_N] = bits_N

    def patch(self, meta: Mapping[str, object]) -> Patch:
        """The difference to the base, as a file holds it."""
        assert self.base_info is not None, "weights built by hand have no base to patch"
        return step_patch(self, self._difference(), self.base_info, meta)

    def _difference(self) -> dict[str, Changed]:
        return {
            name: Changed(o.position_N, o.base_bits_N, bits_of(self.tensors[name])[o.position_N])
            for name, o in self.overlay.items()
        }

    def changed_counts(self) -> tuple[int, int]:
        """Entries that differ from the base: in any bit, and by more than 1e-5."""
        any_bit = moved = 0
        for name, entries in self._difference().items():
            dtype = self.tensors[name].dtype
            now_N = entries.after_bits_N.view(dtype).double()
            base_N = entries.before_bits_N.view(dtype).double()
            any_bit += int((entries.after_bits_N != entries.before_bits_N).sum())
            moved += int(((now_N - base_N).abs() > MOVED).sum())
        return any_bit, moved


def step_patch(
    weights: Weights, changed: Mapping[str, Changed], base: BaseInfo, meta: Mapping[str, object]
) -> Patch:
    """A step's or a run's changes in the form that is saved. `base` names what it applies to."""
    tensors = {}
    for name, entries in sorted(changed.items()):
        stored = weights.tensors[name]
        delta = TensorPatch.from_bits(
            DTYPE_NAMES[stored.dtype],
            tuple(stored.shape),
            entries.position_N.cpu().numpy(),
            unsigned(entries.before_bits_N),
            unsigned(entries.after_bits_N),
        )
        if len(delta.positions):
            tensors[name] = delta
    return Patch(tensors=tensors, base=base, meta=dict(meta))


@dataclass
class Transaction:
    """One optimizer step over `weights`: gradients in, one commit out. See the module's law."""

    weights: Weights
    lr: float
    clip: float | None
    _square: Tensor | None = None
    _proposed: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def propose(
        self, name: str, gradient: Tensor, *, first_row: int = 0, row_R: Tensor | None = None
    ) -> None:
        """Take the float32 gradient of some rows of one tensor: those from `first_row` on, or `row_R`.

        Every row belongs to one proposal only. Syncs with the device once (the count of kept entries).
        """
        square = _square(gradient)
        self._square = square if self._square is None else self._square + square
        stored = self.weights.tensors[name]
        window = stored[first_row : first_row + len(gradient)] if row_R is None else stored[row_R]
        after = _rounded(window, gradient, self.lr * self._factor(self._square.sqrt()))
        kept_N = torch.nonzero(bits_of(after) != bits_of(window.contiguous())).view(-1)
        width = stored.numel() // len(stored)
        if row_R is None:
            position_N = kept_N + first_row * width
        else:
            position_N = row_R[kept_N // width] * width + kept_N % width
        if stored.numel() < 2**31:  # four bytes less for every entry that waits
            position_N = position_N.int()
        self._proposed.setdefault(name, []).append((position_N, gradient.reshape(-1)[kept_N]))

    def _factor(self, norm: Tensor) -> Tensor:
        if self.clip is None:
            return torch.ones_like(norm)
        return (self.clip / (norm + 1e-6)).clamp(max=1.0)

    def commit(self) -> Commit:
        """Round the proposed entries at the true clip factor and write them, or nothing."""
        assert self._square is not None, "no gradient was proposed"
        norm = float(self._square.sqrt())
        if not math.isfinite(norm):
            return Commit(norm, 0.0, {}, dropped=f"the gradient's norm is {norm}")
        factor = self._factor(self._square.sqrt())
        changed = {}
        for name in list(self._proposed):
            chunks = self._proposed.pop(name)  # so that what waits and what is committed never coexist
            position_N = torch.cat([p for p, _ in chunks]).long()
            gradient_N = torch.cat([g for _, g in chunks])
            position_N, order_N = torch.sort(position_N)
            before_N = self.weights.tensors[name].view(-1)[position_N]
            after_N = _rounded(before_N, gradient_N[order_N], self.lr * factor)
            differs_N = bits_of(after_N) != bits_of(before_N)
            if bool(differs_N.any()):
                changed[name] = Changed(
                    position_N[differs_N], bits_of(before_N)[differs_N], bits_of(after_N)[differs_N]
                )
        self.weights.write_(changed)
        return Commit(norm, float(factor), changed)


def _square(gradient: Tensor) -> Tensor:
    """Sum of squares: float32 within blocks of 4096, float64 across them (no float64 copy of it all)."""
    flat = gradient.reshape(-1)
    whole = flat.numel() // 4096 * 4096
    norm_X = torch.linalg.vector_norm(flat[:whole].view(-1, 4096), dim=1)
    return norm_X.double().square().sum() + flat[whole:].double().square().sum()


def _rounded(weight: Tensor, gradient: Tensor, step: Tensor) -> Tensor:
    """w' of the update rule; float32 arithmetic, one rounding. `step` is lr * c, a 0-d tensor."""
    return (weight.float() - step.float() * gradient.float()).to(weight.dtype)
