"""A patch of a checkpoint, applied to a GGUF of it: only the blocks with a changed entry are written.

Law: apply(convert(base), patch) == convert(apply(base, patch)), and revert leads back, byte for byte.

A format that holds the checkpoint's numbers without rounding (its own, or float32 for bf16 and f16) is read
back exactly, and the patch's hashes tell base, patched and stranger apart. For any other (Q8_0; F16 of a
BF16 checkpoint) a changed block is encoded from the base's exact numbers, so the base is needed: its touched
blocks, encoded with and without the patch, are compared with the file's. Of a GGUF that somebody else made
this holds too, if it was converted from the base itself and its formats are these.

In place, the undo file of undo.py stands beside the GGUF until the end.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import undo
from ..checkpoint import Checkpoint, Verification
from ..container import some
from ..errors import InputError
from ..patch import AlreadyApplied, NotApplied, Patch, TensorPatch, WrongBase, sync_folder
from .file import Gguf, GgufTensor
from .formats import FORMATS, Format, bits_of_values, name_of, values_of_bits
from .layout import EMBEDDING, HEAD, gguf_name, heads_in, row_in_checkpoint, row_in_gguf
from .write import encoded, values_of_checkpoint

Array = npt.NDArray[Any]
FindBase = Callable[[str], Path]


@dataclass(frozen=True)
class _Touched:
    """The blocks [N] of a tensor that a patch touches, with it and without; `state`: which the file has."""

    tensor: GgufTensor
    block_N: Array
    now: Array
    base: Array
    patched: Array
    state: str


class _Change:
    """What a patch is to a file. `base`: the checkpoint's folder, or how to find it by name when needed."""

    def __init__(self, path: Path, patch: Patch, base: Path | FindBase) -> None:
        undo.refuse_if_interrupted(path.parent)
        self.patch, self.gguf = patch, Gguf.read(path)
        parts = self.gguf.metadata.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            raise InputError(
                f"{path}: is one of {parts} parts of a GGUF; join them first (llama-gguf-split --merge)"
            )
        self._find = base
        self._base: Checkpoint | None = None
        self.touched = [
            self._touched(name, tensor, target)
            for name, tensor in patch.tensors.items()
            for target in self._targets(name)
        ]

    def _targets(self, name: str) -> list[GgufTensor]:
        """Where a checkpoint's tensor is in the file. Raises WrongBase."""
        ours = gguf_name(name)
        if name == HEAD and ours not in self.gguf.tensors:
            embedding = self.patch.tensors.get(EMBEDDING)
            if embedding == self.patch.tensors[HEAD]:
                return []  # one tensor here, and it changes with the embedding
            raise WrongBase(
                f"{self.gguf.path}: ties its head to its embedding, which the patch changes differently",
                [name],
            )
        if ours is None or ours not in self.gguf.tensors:
            raise WrongBase(
                f"{self.gguf.path}: has no tensor {ours or 'for'} {name}, which the patch changes", [name]
            )
        targets = [ours]
        if name == EMBEDDING and gguf_name(HEAD) in self.gguf.tensors and HEAD not in self.patch.tensors:
            known = self.patch.base.fingerprints
            if not known:
                raise InputError(
                    f"{self.gguf.path}: has a head of its own, and this patch (a step of a run?) does not "
                    "say whether its base has one; use a run's patch.safetensors or patch at -o"
                )
            if HEAD not in known:
                targets.append(str(gguf_name(HEAD)))  # a copy of the embedding
        return [self.gguf.tensors[target] for target in targets]

    def _touched(self, name: str, delta: TensorPatch, tensor: GgufTensor) -> _Touched:
        form = tensor.form
        if form is None:
            raise InputError(
                f"{self.gguf.path}: {tensor.name} is {name_of(tensor.code)}; a patch is applied to "
                f"{', '.join(FORMATS)}: apply it to the checkpoint (patch apply BASE PATCH -o FOLDER), "
                "convert that, and quantise the result with llama-quantize"
            )
        if tensor.shape != delta.shape:
            raise WrongBase(
                f"{self.gguf.path}: {tensor.name} is {list(tensor.shape)}, the patch is for {name} "
                f"{list(delta.shape)}; use a GGUF of the weights that it was made from",
                [name],
            )
        width = math.prod(delta.shape[1:])
        heads = heads_in(self.gguf, name)
        row_N, column_N = np.divmod(delta.positions, width)
        place_N = row_in_gguf(delta.shape[0], heads)[row_N] * width + column_N
        if form.holds(delta.dtype):
            return self._exact(delta, tensor, form, place_N)
        return self._through_base(name, delta, tensor, place_N, heads)

    def _exact(self, delta: TensorPatch, tensor: GgufTensor, form: Format, place_N: Array) -> _Touched:
        now = np.asarray(self.gguf.blocks(tensor, "r")[place_N])
        bits_N = bits_of_values(delta.dtype, form.decode(now).reshape(-1))
        state = "neither" if bits_N is None else delta.state_of(bits_N)
        if bits_N is None or state == "neither":
            return _Touched(tensor, place_N, now, now, now, "neither")
        base_N = bits_N if state == "base" else delta.reverted(bits_N)
        base, patched = (
            form.encode(values_of_bits(delta.dtype, bits)[:, None])
            for bits in (base_N, delta.applied(base_N))
        )
        return _Touched(tensor, place_N, now, base, patched, state)

    def _through_base(
        self, name: str, delta: TensorPatch, tensor: GgufTensor, place_N: Array, heads: int | None
    ) -> _Touched:
        form = tensor.form
        assert form is not None
        checkpoint = self.base()
        base_N = checkpoint.touched_bits(name, delta)
        if delta.state_of(base_N) != "base":
            raise InputError(
                f"{checkpoint.folder}: is not the base of this patch, whose numbers {form.name} needs; "
                "give it with --base"
            )
        width = math.prod(delta.shape[1:])
        block_N, of_N = np.unique(place_N // form.block, return_inverse=True)
        row_M, column_M = np.divmod(block_N[:, None] * form.block + np.arange(form.block), width)
        own_M = row_in_checkpoint(delta.shape[0], heads)[row_M] * width + column_M
        value_M = values_of_bits(delta.dtype, np.asarray(checkpoint.bits(name)[own_M]))
        base = form.encode(value_M)
        value_M[of_N, place_N % form.block] = values_of_bits(delta.dtype, delta.applied(base_N))
        patched = form.encode(value_M)
        now = np.asarray(self.gguf.blocks(tensor, "r")[block_N])
        states = {"base": np.array_equal(now, base), "applied": np.array_equal(now, patched)}
        state = (
            "either" if all(states.values()) else next((s for s, holds in states.items() if holds), "neither")
        )
        return _Touched(tensor, block_N, now, base, patched, state)

    def base(self) -> Checkpoint:
        """The checkpoint that the patch was made for. Raises InputError where it is not found."""
        if self._base is None:
            if isinstance(self._find, Path):
                self._base = Checkpoint(self._find)
            else:
                try:
                    self._base = Checkpoint(self._find(self.patch.base.name))
                except InputError as error:
                    raise InputError(
                        f"{self.gguf.path}: holds rounded numbers, so its blocks are encoded anew from the "
                        f"base, which the patch calls {self.patch.base.name!r}: {error}; give its folder "
                        "with --base"
                    ) from error
        return self._base

    def state(self) -> str:
        """ "base" or "applied"; an empty patch says base. Raises WrongBase."""
        states = {one.tensor.name: one.state for one in self.touched}
        wrong = [name for name, state in states.items() if state == "neither"]
        name = self.patch.base.name
        if wrong:
            raise WrongBase(
                f"{self.gguf.path}: is neither a GGUF of the base {name!r} nor of that base with the patch: "
                f"touched blocks of {some(wrong)} differ; use one that was converted from the base itself",
                wrong,
            )
        told = set(states.values()) - {"either"}
        if len(told) > 1:
            applied = [tensor for tensor, state in states.items() if state == "applied"]
            raise WrongBase(
                f"{self.gguf.path}: holds the patch in {some(applied)} but not in all of its {len(states)} "
                f"tensors; use a GGUF of the base {name!r}, whole",
                applied,
            )
        return told.pop() if told else "base"

    def check(self, direction: str) -> None:
        """Raises AlreadyApplied, NotApplied, WrongBase where this change cannot be made."""
        state = self.state()
        if direction == "apply" and state == "applied":
            raise AlreadyApplied(f"{self.gguf.path}: already holds the patch for {self.patch.base.name!r}")
        if direction == "revert" and state == "base" and self.patch.tensors:
            raise NotApplied(
                f"{self.gguf.path}: is a GGUF of the base {self.patch.base.name!r} itself; there is nothing "
                "to take off"
            )

    def write_(self, path: Path, direction: str) -> None:
        """Write the touched blocks into a file that has this header."""
        target = Gguf(path, self.gguf.metadata, self.gguf.tensors)
        for one in self.touched:
            mapped = target.blocks(one.tensor, "r+")
            mapped[one.block_N] = one.patched if direction == "apply" else one.base
            mapped.flush()  # type: ignore[attr-defined]

    def records(self) -> list[undo.Record]:
        """The bytes that will be written, as they are now."""
        out = []
        for one in self.touched:
            size = one.now.shape[1]
            place = (one.block_N[:, None] * size + np.arange(size)).reshape(-1)
            out.append(undo.Record(self.gguf.path.name, one.tensor.offset, place, one.now.reshape(-1)))
        return out

    def compare_all(self) -> None:
        """Every tensor of the file against the base's, the touched blocks apart. Raises WrongBase."""
        values = values_of_checkpoint(self.base())
        touched = {one.tensor.name: one.block_N for one in self.touched}
        for name, value in values.items():
            tensor = self.gguf.tensors.get(str(gguf_name(name)))
            if tensor is None and name == HEAD:
                continue
            if tensor is None or tensor.form is None or tensor.shape != value.shape:
                raise WrongBase(f"{self.gguf.path}: has no tensor like the base's {name}", [name])
            now, first = self.gguf.blocks(tensor, "r"), 0
            apart = touched.get(tensor.name, np.zeros(0, np.int64))
            for chunk in encoded(name, value, tensor.form, heads_in(self.gguf, name)):
                blocks = chunk.reshape(-1, tensor.form.block_bytes)
                differs = (now[first : first + len(blocks)] != blocks).any(axis=1)
                differs[apart[(apart >= first) & (apart < first + len(blocks))] - first] = False
                if differs.any():
                    raise WrongBase(
                        f"{self.gguf.path}: {int(differs.sum()):,} blocks of {tensor.name} that the patch "
                        f"does not touch are not those of the base {self.patch.base.name!r}",
                        [name],
                    )
                first += len(blocks)


def apply(
    path: Path, patch: Patch, base: Path | FindBase, *, out: Path | None = None, force: bool = False
) -> Verification:
    """Write the patch into the file, or into a copy `out`.

    Raises WrongBase, AlreadyApplied; InputError for a format that cannot be patched, by name.
    """
    return _change(path, patch, base, "apply", out, force)


def revert(
    path: Path, patch: Patch, base: Path | FindBase, *, out: Path | None = None, force: bool = False
) -> Verification:
    """Take the patch off the file, or off a copy `out`. Raises WrongBase, NotApplied, InputError."""
    return _change(path, patch, base, "revert", out, force)


def verify(path: Path, patch: Patch, base: Path | FindBase, *, full: bool = False) -> Verification:
    """Whether a file is of the base or has the patch, by the touched blocks; `full`: by all.

    Raises WrongBase.
    """
    change = _Change(path, patch, base)
    state = change.state()
    if full:
        change.compare_all()
    return Verification(state, patch.base.name, len(patch.tensors), patch.entries, full)


def _change(
    path: Path, patch: Patch, base: Path | FindBase, direction: str, out: Path | None, force: bool
) -> Verification:
    if out is None:
        if path.is_symlink() or (path.exists() and path.stat().st_nlink > 1):
            raise InputError(f"{path}: is a link to a file that others share; write to another file with -o")
        with undo.locked(path.parent):
            undo.recover_(path.parent)
            change = _Change(path, patch, base)
            change.check(direction)
            records = change.records()
            undo.write(path.parent, records)
            change.write_(path, direction)
            undo.finish(path.parent, records)
    else:
        change = _Change(path, patch, base)
        change.check(direction)
        _write_copy(change, path, out, direction, force)
    return Verification(
        "applied" if direction == "apply" else "base",
        patch.base.name,
        len(patch.tensors),
        patch.entries,
        False,
    )


def _write_copy(change: _Change, path: Path, out: Path, direction: str, force: bool) -> None:
    if out.resolve() == path.resolve():
        raise InputError(f"{out}: is the file itself; give another name, or --in-place")
    if out.is_dir():
        raise InputError(f"{out}: is a folder; give the name of a file")
    if out.exists() and not force:
        raise InputError(f"{out}: exists; give another name, or --force to replace it")
    out.parent.mkdir(parents=True, exist_ok=True)
    sibling = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        shutil.copyfile(path, sibling)
        change.write_(sibling, direction)
        undo.sync_file(sibling)
        os.replace(sibling, out)
        sync_folder(out.parent)
    finally:
        sibling.unlink(missing_ok=True)
