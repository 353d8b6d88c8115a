"""The policy's weights: the checkpoint's tensors, whole, in int8 or streamed, and the patch that leads back.

Law: `policy = base + overlay`. The overlay keeps, for every entry that any step has changed, its flat
position and the bits that the tensor itself does not hold (storage.py: a tensor changed in place misses
the base's, a frozen int8 matrix the policy's); `base()` takes it off for as long as the reference policy
is wanted, and `patch()` is the difference. Nothing else is stored: no second model, no master copy, no
optimizer state.

With streamed matrices (`host` weights) the policy has two readers: what `load`, `rows` and `lookup` return
is the checkpoint's exact policy, but inside `sampling()` it is the int8 twin's. `bring` puts a layer's
matrices on the device.

Update rule (plain SGD under the storage format's own rounding), for entry w with gradient g:

    w' = round_to_storage( float32(w) - (lr * c) * float32(g) ),   c = min(1, clip / (||g|| + 1e-6))

(storage.py says what the grid of an int8 matrix is) and the entry *changes* when w' has other bits than w.
A step is a transaction (`Transaction`):

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .errors import FrugalError, InputError
from .kernels.choice import use_triton
from .patch import AlreadyApplied, BaseInfo, Patch, TensorPatch, WrongBase
from .storage import (
    BLOCK,
    Changed,
    Held,
    Overlay,
    Plain,
    Quantised,
    Rows,
    Streamed,
    Whole,
    bits_of,
    rounded,
)
from .stream import LayerStream, Source

if TYPE_CHECKING:
    from .kernels.propose import Below

STORAGE = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in STORAGE.items()}
PROPOSED = 1 << 22  # entries that are proposed at a time: 70 MiB of scratch
MOVED = 1e-5  # the papers' threshold for "changed" (arXiv 2505.11711, 2602.07729)


def unsigned(bits_N: Tensor) -> np.ndarray:
    """Bits on the host as numpy's unsigned integers, the form patches are made of."""
    return bits_N.cpu().numpy().view(f"u{bits_N.element_size()}")


def signed(bits_N: np.ndarray, device: torch.device) -> Tensor:
    """Inverse of `unsigned`."""
    return torch.from_numpy(bits_N.view(f"i{bits_N.itemsize}").copy()).to(device)


@dataclass(frozen=True)
class Commit:
    """What a step did. `changed` is empty when it was dropped, and `dropped` says why.

    `adapted`: entries that changed of what is trained beside frozen weights (lora.py).
    """

    norm: float
    scale: float
    changed: Mapping[str, Changed]
    dropped: str | None = None
    adapted: int = 0

    @property
    def entries(self) -> int:
        return sum(len(c.position_N) for c in self.changed.values()) + self.adapted


class Weights:
    """All tensors of one checkpoint on one device: in its own format, or its matrices in int8 or streamed.

    `compute_dtype` is what `load` and `rows` return: float32 on a CPU (where bf16 arithmetic is many
    times slower), the storage format elsewhere. `held` has the tensors in the form they are held in.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor | Held],
        *,
        compute_dtype: torch.dtype | None = None,
        base: BaseInfo | None = None,
    ) -> None:
        self.held: dict[str, Held] = {
            name: Plain(tensor) if isinstance(tensor, Tensor) else tensor for name, tensor in tensors.items()
        }
        self.device = next(iter(self.held.values())).overlay.position_N.device
        quantised = [h for h in self.held.values() if isinstance(h, Quantised)]
        dtypes = [h.dtype for h in quantised or self.held.values()]
        self.storage_dtype = max(dtypes, key=lambda d: d.itemsize)
        if compute_dtype is None:
            compute_dtype = torch.float32 if self.device.type == "cpu" else self.storage_dtype
        self.compute_dtype = compute_dtype
        self.base_info = base
        # told of every change: a sampler that holds a copy of its own
        self.watchers: list[Callable[[Mapping[str, Changed]], None]] = []
        self._sampling = False
        self._stream: LayerStream | None = None
        self._present: tuple[int, list[Streamed]] | None = None

    @classmethod
    def from_checkpoint(
        cls,
        folder: Path,
        device: torch.device,
        *,
        name: str,
        names: frozenset[str],
        quantise: bool = False,
        stream: bool = False,
        whole: bool = False,
    ) -> Weights:
        """Load tensor by tensor. Peak: the final size and one tensor; quantising, and a block of rows.

        `name`: what patches call the base. `names`: the tensors wanted (a checkpoint may hold a copy of
        a tied head). `quantise`: hold matrices in int8. `stream`: leave them in the checkpoint; with
        `quantise` too, for a sampler, in int8 beside it. `whole`: keep no patch in memory, as most entries
        will change. Raises InputError for a format that SGD cannot be exact on.
        """
        checkpoint = Checkpoint(folder)
        tensors: dict[str, Tensor | Held] = {}
        for key, info in checkpoint.tensors.items():
            if key not in names:
                continue
            if info.dtype not in STORAGE:
                raise InputError(
                    f"{folder}: {key} is {info.dtype}; weights are trained in "
                    f"{', '.join(STORAGE)}: take an unquantised checkpoint"
                )
            source = Source(info, STORAGE[info.dtype])
            if (quantise or stream) and len(info.shape) == 2:
                codes = _quantised(source, device, own=stream) if quantise else None
                if stream:
                    tensors[key] = Streamed(source, device, codes)
                elif codes is not None:
                    tensors[key] = codes
                continue
            tensor = source.copy_to_(torch.empty(info.shape, dtype=source.dtype, device=device))
            tensors[key] = Whole(tensor, source) if whole else tensor
        if quantise and not stream:
            # the base is a function of the checkpoint, known by the entries that a patch touches
            return cls(tensors, base=BaseInfo(f"{name} (int8)", {}))
        return cls(tensors, base=BaseInfo(name, checkpoint.fingerprints()))

    # --- reading

    @property
    def parameters(self) -> int:
        return sum(math.prod(h.shape) for h in self.held.values())

    @property
    def nbytes(self) -> int:
        """On the device: of all tensors, and of the overlay where it is part of the policy."""
        return sum(h.nbytes for h in self.held.values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The policy's tensors: the storage itself, but a dense copy of a quantised one (tests)."""
        return {
            name: h.tensor if isinstance(h, Plain) else h.rows(slice(0, h.shape[0]), h.dtype)
            for name, h in self.held.items()
        }

    @property
    def overlay(self) -> dict[str, Overlay]:
        """Of every tensor that has changed."""
        return {name: h.overlay for name, h in self.held.items() if len(h.overlay)}

    def seen(self, name: str) -> Held:
        """The tensor as the present reader has it: the sampler of a streamed matrix sees its int8 twin."""
        held = self.held[name]
        return held.sampled if self._sampling and isinstance(held, Streamed) and held.sampled else held

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """While the sampler reads. The layers' place on the device is free for its cache."""
        self.release()
        self._sampling = True
        try:
            yield
        finally:
            self._sampling = False

    def stream_by(self, groups: Sequence[Sequence[str]]) -> None:
        """Say which tensors `bring` brings together: the layers, in order."""
        streamed = [{n: h for n in group if isinstance(h := self.held[n], Streamed)} for group in groups]
        if any(streamed):
            self._groups = streamed
            sources = [{name: held.source for name, held in group.items()} for group in streamed]
            self._stream = LayerStream(sources, self.device)

    @property
    def streams(self) -> bool:
        """Whether layers have to be brought, one at a time."""
        return self._stream is not None

    def bring(self, index: int) -> None:
        """Have group `index` on the device, until another is brought. No effect where nothing is streamed."""
        if self._stream is None or self._sampling or (self._present and self._present[0] == index):
            return
        self._leave()
        arrived = self._stream.bring(index)
        group = self._groups[index]
        for name, held in group.items():
            held.arrive_(arrived[name])
        self._present = index, list(group.values())

    def _leave(self) -> None:
        """No layer is on the device: what is brought next has the patch of then."""
        if self._present:
            for held in self._present[1]:
                held.arrive_(None)
        self._present = None

    def release(self) -> None:
        """Give back the device memory in which layers are brought."""
        self._leave()
        if self._stream is not None:
            self._stream.release()

    def load(self, name: str, scratch: Tensor | None = None) -> Tensor:
        """The whole tensor in the compute format: a view where it is stored so, else a copy in `scratch`."""
        held = self.seen(name)
        whole = held.whole(self.compute_dtype)
        if whole is not None:
            return whole
        if scratch is None:
            scratch = torch.empty(math.prod(held.shape), dtype=self.compute_dtype, device=self.device)
        return held.copy_to_(scratch[: math.prod(held.shape)].view(held.shape))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) in the compute format."""
        return self.seen(name).rows(slice(start, stop), self.compute_dtype)

    def lookup(self, name: str, index_T: Tensor) -> Tensor:
        """Rows by index (an embedding) in the compute format."""
        return self.seen(name).rows(index_T, self.compute_dtype)

    # --- writing

    def write_(self, changed: Mapping[str, Changed]) -> None:
        """Lay a step over the weights and remember what was below. In place.

        Raises FrugalError where that fails half-way, for want of memory: nobody may try the step again.
        """
        self._leave()
        try:
            for name, entries in changed.items():
                self.held[name].write_(entries)
        except RuntimeError as error:
            raise FrugalError(
                f"the weights in memory hold a part of a step only, as writing it failed: {error}; the run "
                "folder has all steps before it: go on with frugal-rl train --resume, and a smaller "
                "memory.budget"
            ) from error
        for watcher in self.watchers:
            watcher(changed)

    def write_patch_(self, patch: Patch) -> None:
        """Lay a patch over the weights (resume, evaluation of base + patch). In place.

        Raises PatchError before anything is written: WrongBase, AlreadyApplied, DamagedPatch.
        """
        missing = sorted(set(patch.tensors) - set(self.held))
        if missing:
            raise WrongBase(f"the patch changes {missing[0]}, which this model does not have", missing)
        before: dict[str, tuple[Tensor, Tensor]] = {}
        for name, delta in patch.tensors.items():
            held = self.held[name]
            if (DTYPE_NAMES[held.dtype], tuple(held.shape)) != (delta.dtype, delta.shape):
                got = f"{DTYPE_NAMES[held.dtype]} {list(held.shape)}"
                raise WrongBase(
                    f"{name} is {got}, the patch is for {delta.dtype} {list(delta.shape)}", [name]
                )
            position_N = torch.from_numpy(np.array(delta.positions)).to(self.device)
            before[name] = position_N, bits_of(held.at(position_N))
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
        self._leave()
        policy: dict[str, Overlay] = {}
        try:
            for name, held in self.held.items():  # memory may run out between two
                policy[name] = held.take_off_()
            yield
        finally:
            self._leave()
            for name, overlay in policy.items():
                self.held[name].put_back_(overlay)

    def patch(self, meta: Mapping[str, object]) -> Patch:
        """The difference to the base, as a file holds it."""
        assert self.base_info is not None, "weights built by hand have no base to patch"
        return step_patch(self, self.difference(), self.base_info, meta)

    def difference(self) -> dict[str, Changed]:
        """From the base to the policy, over all entries that any step has changed."""
        return dict(self._differences())

    def _differences(self) -> Iterator[tuple[str, Changed]]:
        for name, held in self.held.items():
            if isinstance(held, Whole) or len(held.overlay):
                yield name, held.difference()

    def changed_counts(self) -> tuple[int, int]:
        """Entries that differ from the base: in any bit, and by more than 1e-5."""
        return counts((entries, self.held[name].dtype) for name, entries in self._differences())


def counts(changes: Iterable[tuple[Changed, torch.dtype]]) -> tuple[int, int]:
    """Entries that changed, of tensors of those formats: in any bit, and by more than 1e-5."""
    any_bit = moved = 0
    for entries, dtype in changes:
        now_N = entries.after_bits_N.view(dtype).double()
        base_N = entries.before_bits_N.view(dtype).double()
        any_bit += int((entries.after_bits_N != entries.before_bits_N).sum())
        moved += int(((now_N - base_N).abs() > MOVED).sum())
    return any_bit, moved


def _quantised(source: Source, device: torch.device, *, own: bool) -> Quantised:
    """A checkpoint's matrix, quantised a block of rows at a time; its values in its `own` format or bf16."""
    made = Quantised.empty(tuple(source.shape), device, source.dtype if own else torch.bfloat16)
    height, width = source.shape
    rows = max(1, BLOCK // width)
    for start in range(0, height, rows):
        part_RI = torch.empty(min(rows, height - start), width, dtype=source.dtype)
        made.quantise_rows_(start, source.read_(part_RI, start * width).to(device))
    return made


def export(weights: Weights, folder: Path, name: str, meta: Mapping[str, object]) -> tuple[Patch, int]:
    """The patch of int8 weights for the checkpoint they were quantised from, and how many entries it loses.

    A changed entry becomes the checkpoint's value + (learned value - the int8 base's value), in float32,
    rounded once; it is lost when that has the checkpoint's own bits. What is held whole is exact.
    """
    checkpoint, lost = Checkpoint(folder), 0
    tensors = {}
    for key, entries in sorted(weights.difference().items()):
        moved_N = entries.before_bits_N != entries.after_bits_N
        position_N, before_N, after_N = (
            part[moved_N].cpu() for part in (entries.position_N, entries.before_bits_N, entries.after_bits_N)
        )
        held, info = weights.held[key], checkpoint.tensors[key]
        if isinstance(held, Quantised):
            learned_N = after_N.view(held.dtype).float() - before_N.view(held.dtype).float()
            before_N = signed(checkpoint.bits(key)[position_N.numpy()], torch.device("cpu"))
            own_N = before_N.view(STORAGE[info.dtype])
            after_N = bits_of((own_N.float() + learned_N).to(own_N.dtype))
            lost += int((after_N == before_N).sum())
        delta = TensorPatch.from_bits(
            info.dtype, info.shape, position_N.numpy(), unsigned(before_N), unsigned(after_N)
        )
        if len(delta.positions):
            tensors[key] = delta
    return Patch(tensors=tensors, base=BaseInfo(name, checkpoint.fingerprints()), meta=dict(meta)), lost


def step_patch(
    weights: Weights, changed: Mapping[str, Changed], base: BaseInfo, meta: Mapping[str, object]
) -> Patch:
    """A step's or a run's changes in the form that is saved. `base` names what it applies to."""
    tensors = {}
    for name, entries in sorted(changed.items()):
        held = weights.held[name]
        delta = TensorPatch.from_bits(
            DTYPE_NAMES[held.dtype],
            tuple(held.shape),
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
    # by tensor: positions, gradients, and the bits of before
    _proposed: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)

    def propose(
        self, name: str, gradient: Tensor, *, first_row: int = 0, row_R: Tensor | None = None
    ) -> None:
        """Take the float32 gradient of some rows of one tensor: those from `first_row` on, or `row_R`.

        Every row belongs to one proposal only. Syncs with the device (the count of kept entries).
        """
        below = self.weights.held[name].under() if use_triton(gradient.device) else None
        if below is not None:
            self._propose_in_one_pass(name, gradient, below, first_row, row_R)
            return
        square = sum_of_squares(gradient)
        self._square = square if self._square is None else self._square + square
        step = self.lr * clip_factor(self._square.sqrt(), self.clip)
        most = max(1, PROPOSED // math.prod(gradient.shape[1:]))
        for start in range(0, len(gradient), most):
            part = gradient[start : start + most]
            first = first_row + start
            rows = slice(first, first + len(part)) if row_R is None else row_R[start : start + most]
            self._propose_rows(name, part, step, rows)

    def _propose_in_one_pass(
        self, name: str, gradient: Tensor, below: Below, first_row: int, row_R: Tensor | None
    ) -> None:
        """As the plain path, but that c is bounded by the norm before this gradient: that keeps no fewer."""
        from .kernels.propose import propose

        if gradient.ndim == 1:  # a vector is one row, and a part of it rows of one entry
            whole = row_R is None and len(gradient) == below.weight_OI.numel()
            gradient = gradient.view(1, -1) if whole else gradient.view(-1, 1)
            below = replace(below, weight_OI=below.weight_OI.view(-1, gradient.shape[1]))
        before = self._square
        if before is None:
            before = torch.zeros((), dtype=torch.float64, device=gradient.device)
        step = self.lr * clip_factor(before.sqrt(), self.clip)
        square, kept = propose(gradient, below, step, first_row, row_R)
        self._square = before + square
        self._proposed.setdefault(name, []).append(kept)

    def _propose_rows(self, name: str, gradient: Tensor, step: Tensor, rows: Rows) -> None:
        held = self.weights.held[name]
        before = held.rows(rows, held.dtype)
        before_bits_N = bits_of(before.contiguous())
        after = rounded(before, gradient, step, held.coarse(rows))
        kept_N = torch.nonzero(bits_of(after) != before_bits_N).view(-1)
        width = math.prod(held.shape[1:])
        if isinstance(rows, slice):
            position_N = kept_N + rows.start * width
        else:
            position_N = rows[kept_N // width] * width + kept_N % width
        if math.prod(held.shape) < 2**31:  # four bytes less for every entry that waits
            position_N = position_N.int()
        kept = position_N, gradient.reshape(-1)[kept_N], before_bits_N[kept_N]
        self._proposed.setdefault(name, []).append(kept)

    def commit(self) -> Commit:
        """Round the proposed entries at the true clip factor and write them, or nothing."""
        assert self._square is not None, "no gradient was proposed"
        norm = float(self._square.sqrt())
        if not math.isfinite(norm):
            return Commit(norm, 0.0, {}, dropped=f"the gradient's norm is {norm}")
        factor = clip_factor(self._square.sqrt(), self.clip)
        if norm == 0:  # not even the sign of a zero changes
            return Commit(norm, float(factor), {})
        changed = {}
        for name in list(self._proposed):
            chunks = self._proposed.pop(name)  # so that what waits and what is committed never coexist
            position_N, order_N = torch.sort(torch.cat([position for position, _, _ in chunks]))
            position_N = position_N.long()
            gradient_N = torch.cat([gradient for _, gradient, _ in chunks])[order_N]
            before_bits_N = torch.cat([bits for _, _, bits in chunks])[order_N]
            held = self.weights.held[name]
            before_N = before_bits_N.view(held.dtype)
            after_N = rounded(before_N, gradient_N, self.lr * factor, held.coarse_at(position_N))
            differs_N = bits_of(after_N) != before_bits_N
            if bool(differs_N.any()):
                changed[name] = Changed(
                    position_N[differs_N], before_bits_N[differs_N], bits_of(after_N)[differs_N]
                )
        self.weights.write_(changed)
        return Commit(norm, float(factor), changed)


def clip_factor(norm: Tensor, clip: float | None) -> Tensor:
    """c of the update rule."""
    return torch.ones_like(norm) if clip is None else (clip / (norm + 1e-6)).clamp(max=1.0)


def sum_of_squares(gradient: Tensor) -> Tensor:
    """Sum of squares: float32 within blocks of 4096, float64 across them (no float64 copy of it all)."""
    flat = gradient.reshape(-1)
    whole = flat.numel() // 4096 * 4096
    norm_X = torch.linalg.vector_norm(flat[:whole].view(-1, 4096), dim=1)
    return norm_X.double().square().sum() + flat[whole:].double().square().sum()
