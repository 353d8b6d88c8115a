"""Checkpoints as Hugging Face folders of safetensors, and what patches do with them, without torch.

Laws: apply(base, diff(base, trained)) has the bits of trained; revert(apply(base, p), p) is base,
byte for byte; merge(base, [p, q]) is p, then q.
Invariants: weights are read through maps of one tensor at a time, so memory is a few tensors and
never the model; a folder is never written before the patch was seen to fit it; a new folder appears
whole, by a rename; a change in place can always be taken back (see `undo.py`).

Source: https://github.com/huggingface/safetensors, README ("Format"); the index file as written by
transformers (`weight_map`: tensor -> file).
Differs: own reader, because numpy's view of safetensors knows no bfloat16.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from frugal_rl import undo
from frugal_rl.container import MAX_HEADER_BYTES, some
from frugal_rl.errors import InputError
from frugal_rl.patch import (
    BITS,
    AlreadyApplied,
    BaseInfo,
    NotApplied,
    Patch,
    PatchError,
    TensorPatch,
    WrongBase,
    fingerprint_of_tensor,
    sync_folder,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CHUNK_ENTRIES = 2**22
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
HEAD = "lm_head.weight"

Array = npt.NDArray[Any]
Folder = str | os.PathLike[str]


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `offset` and `nbytes` are bytes of `file`."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


class Checkpoint:
    """The tensors of a folder, by name. Raises InputError when it is not one, or is half-written."""

    def __init__(self, folder: Folder) -> None:
        self.folder = Path(folder)
        undo.refuse_if_interrupted(self.folder)
        self.tensors: dict[str, TensorInfo] = {}
        for file, wanted in sorted(_weight_files(self.folder).items()):
            found = read_safetensors_header(self.folder / file)
            missing = sorted(wanted - set(found)) if wanted is not None else []
            if missing:
                raise InputError(
                    f"{self.folder / file}: lacks {some(missing)}, which {INDEX_FILE} says it holds; "
                    "fetch the checkpoint again"
                )
            self.tensors.update({name: found[name] for name in (found if wanted is None else wanted)})
        self.tensors = {name: self.tensors[name] for name in sorted(self.tensors)}

    def bits(self, name: str) -> Array:
        """The tensor's entries, flat, as unsigned integers: a read-only map of the file."""
        return map_tensor(self.tensors[name], "r")

    def fingerprint(self, name: str) -> str:
        """Reads the whole tensor."""
        info = self.tensors[name]
        return fingerprint_of_tensor(info.dtype, info.shape, _pieces(info))

    def fingerprints(self) -> dict[str, str]:
        """Reads the whole checkpoint."""
        return {name: self.fingerprint(name) for name in self.tensors}

    def touched_bits(self, name: str, tensor: TensorPatch) -> Array:
        """The bits [N] of the entries that a patch touches. Raises WrongBase for another tensor."""
        info = self.tensors.get(name)
        if info is None:
            raise WrongBase(f"{self.folder}: has no tensor {name}, which the patch changes", [name])
        if (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
            raise WrongBase(
                f"{self.folder}: {name} is {info.dtype} {list(info.shape)}, the patch is for "
                f"{tensor.dtype} {list(tensor.shape)}; use the weights that it was made from",
                [name],
            )
        return np.asarray(self.bits(name)[tensor.positions])

    def state_of(self, patch: Patch) -> str:
        """ "base" or "applied". Raises WrongBase."""
        return patch.state_of(lambda name: self.touched_bits(name, patch.tensors[name]), str(self.folder))


def map_tensor(info: TensorInfo, mode: str) -> Array:
    """A map ("r" or "r+") of one tensor's bits, flat."""
    bits = BITS[info.dtype]
    if not info.nbytes:
        return np.empty(0, bits)
    shape = (info.nbytes // bits.itemsize,)
    return np.memmap(info.file, bits, mode, info.offset, shape)  # type: ignore[call-overload]


def _pieces(info: TensorInfo) -> Iterator[Array]:
    """The tensor's bits, flat, as they are read: the pages of a map would count as this process's memory."""
    bits = BITS[info.dtype]
    left = info.nbytes // bits.itemsize
    with open(info.file, "rb") as file:
        file.seek(info.offset)
        while left:
            piece = np.fromfile(file, bits, min(left, CHUNK_ENTRIES))
            if not len(piece):
                raise InputError(f"{info.file}: was cut short while it was read; fetch the checkpoint again")
            left -= len(piece)
            yield piece


def _chunks(bits: Array) -> Iterator[Array]:
    for first in range(0, len(bits), CHUNK_ENTRIES):
        yield bits[first : first + CHUNK_ENTRIES]


def _weight_files(folder: Path) -> dict[str, set[str] | None]:
    """The safetensors files of a folder and, where an index says so, the tensors to take from each."""
    if not folder.is_dir():
        got = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{folder}: {got}; give the folder of a Hugging Face checkpoint")
    if (folder / SINGLE_FILE).is_file():
        return {SINGLE_FILE: None}
    if not (folder / INDEX_FILE).is_file():
        suffixes = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".safetensors")
        others = sorted(file.name for file in folder.iterdir() if file.suffix in suffixes)
        holds = f"holds {some(others)}" if others else "holds no weights"
        raise InputError(
            f"{folder}: {holds}; only safetensors is supported ({SINGLE_FILE}, or {INDEX_FILE} with its "
            "files): load the model with transformers and save it with save_pretrained"
        )
    return _indexed_files(folder)


def _indexed_files(folder: Path) -> dict[str, set[str] | None]:
    where = folder / INDEX_FILE
    try:
        index = json.loads(where.read_bytes())
        files: dict[str, set[str] | None] = {}
        for name, file in index["weight_map"].items():
            if file != Path(file).name or not file.endswith(".safetensors"):
                raise InputError(f"{where}: {name} is said to lie in {file!r}, expected a file beside it")
            wanted = files.setdefault(file, set())
            assert wanted is not None
            wanted.add(name)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: is no index of safetensors files ({error!r}); fetch it again") from None
    return files


def read_safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """Where each tensor of a safetensors file lies. Raises InputError where the file is not one."""

    def damaged(got: str) -> InputError:
        return InputError(f"{path}: is no whole safetensors file: {got}; fetch the checkpoint again")

    try:
        with open(path, "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            start = file.read(8)
            size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= size <= min(MAX_HEADER_BYTES, file_bytes - 8):
                raise damaged(f"it has {file_bytes} bytes and its header claims {size} of them")
            header = json.loads(file.read(size))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise damaged(f"its header is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise damaged("its header is no JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(name, info, path, 8 + size, damaged) for name, info in header.items()}
    end = 8 + size
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            raise damaged("its tensors overlap or leave gaps")
        end += info.nbytes
    if end != file_bytes:
        raise damaged(f"it has {file_bytes} bytes, its header says {end}")
    return tensors


def _tensor_info(
    name: str, info: Any, path: Path, start: int, damaged: Callable[[str], InputError]
) -> TensorInfo:
    match info:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            if not all(type(size) is int and size >= 0 for size in shape) or begin < 0:
                raise damaged(f"{name} has shape {str(shape)[:200]} at {begin}")
            if dtype not in BITS:
                raise InputError(f"{path}: {name} is {dtype}; supported are {', '.join(BITS)}")
            if end - begin != math.prod(shape) * BITS[dtype].itemsize:
                raise damaged(f"{name} is {dtype} {str(shape)[:200]} in {end - begin} bytes")
            return TensorInfo(dtype, tuple(shape), path, start + begin, end - begin)
    raise damaged(f"{name} is described by {str(info)[:200]}")


# ------------------------------------------------------------------------------------------ questions


def base_info(folder: Folder, name: str | None = None) -> BaseInfo:
    """What a patch says of its base; `name` is the folder's own where none is given. Reads all weights."""
    return BaseInfo(name or Path(folder).resolve().name, Checkpoint(folder).fingerprints())


@dataclass(frozen=True)
class Verification:
    """What a folder is to a patch: its "base", or the base with the patch "applied"."""

    state: str
    base_name: str
    tensors: int
    entries: int
    full: bool


def verify(folder: Folder, patch: Patch | Folder, *, full: bool = False) -> Verification:
    """Whether a folder is a patch's base or has it applied, by the touched entries alone.

    `full` also compares every tensor with the base's fingerprints, which reads all weights.
    Raises WrongBase.
    """
    patch = _loaded(patch)
    checkpoint = Checkpoint(folder)
    state = checkpoint.state_of(patch)
    if full:
        _compare_fingerprints(checkpoint, patch, state)
    return Verification(state, patch.base.name, len(patch.tensors), patch.entries, full)


def _compare_fingerprints(checkpoint: Checkpoint, patch: Patch, state: str) -> None:
    expected = patch.base.fingerprints
    if not expected:
        raise PatchError(
            f"the patch for {patch.base.name!r} holds no fingerprints of its base; verify without --full"
        )
    names = sorted(set(expected) ^ set(checkpoint.tensors))
    if names:
        raise WrongBase(
            f"{checkpoint.folder}: {some(names)} is only in it or only in the base {patch.base.name!r}; "
            "use the weights that the patch was made from",
            names,
        )
    differing = []
    for name, info in checkpoint.tensors.items():
        chunks = _chunks(checkpoint.bits(name))
        if state == "applied" and name in patch.tensors:
            chunks = _reverted_chunks(chunks, patch.tensors[name])
        if fingerprint_of_tensor(info.dtype, info.shape, chunks) != expected[name]:
            differing.append(name)
    if differing:
        raise WrongBase(
            f"{checkpoint.folder}: the entries that the patch touches are as expected, but {some(differing)} "
            f"differ elsewhere from the base {patch.base.name!r} (fingerprint {patch.base.fingerprint})",
            differing,
        )


def _reverted_chunks(chunks: Iterator[Array], tensor: TensorPatch) -> Iterator[Array]:
    first = 0
    for chunk in chunks:
        begin, end = np.searchsorted(tensor.positions, [first, first + len(chunk)])
        before = np.array(chunk)
        before[tensor.positions[begin:end] - first] -= tensor.difference[begin:end]
        first += len(chunk)
        yield before


def diff(
    base: Folder, trained: Folder, meta: Mapping[str, Any] | None = None, *, name: str | None = None
) -> Patch:
    """The patch from one folder to another, by comparing bits. Raises PatchError for tensors without a pair.

    `lm_head.weight` may be in one folder alone when it is a copy of the embeddings there.
    """
    before, after = Checkpoint(base), Checkpoint(trained)
    tensors = {}
    for ours, theirs in _pairs(before, after).items():
        a, b = before.tensors[ours], after.tensors[theirs]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            raise PatchError(
                f"{ours}: is {a.dtype} {list(a.shape)} in {base} and {b.dtype} {list(b.shape)} in {trained}; "
                "a patch needs the same dtypes and shapes"
            )
        tensors[ours] = _tensor_diff(a, before.bits(ours), after.bits(theirs))
    fingerprints = before.fingerprints()
    return Patch(tensors, BaseInfo(name or before.folder.resolve().name, fingerprints), dict(meta or {}))


def _tensor_diff(info: TensorInfo, before: Array, after: Array) -> TensorPatch:
    found = [np.flatnonzero(a != b) for a, b in zip(_chunks(before), _chunks(after), strict=True)]
    positions = np.concatenate(
        [here + i * CHUNK_ENTRIES for i, here in enumerate(found)] or [np.empty(0, np.int64)]
    )
    return TensorPatch.from_bits(info.dtype, info.shape, positions, before[positions], after[positions])


def _pairs(before: Checkpoint, after: Checkpoint) -> dict[str, str]:
    """Each tensor of the base and the trained tensor to compare it with."""
    pairs = {name: name for name in before.tensors if name in after.tensors}
    missing = [name for name in before.tensors if name not in after.tensors]
    extra = [name for name in after.tensors if name not in before.tensors]
    if missing == [HEAD] and (embeddings := _copy_of_head(before)) in after.tensors:
        pairs[HEAD], missing = str(embeddings), []
    if extra == [HEAD] and _copy_of_head(after):
        extra = []
    if missing or extra:
        lacks = f"{after.folder} lacks {some(missing)}" if missing else ""
        more = f"{before.folder} lacks {some(extra)}" if extra else ""
        raise PatchError(
            f"{'; '.join(filter(None, (lacks, more)))}: a patch needs the same tensors on both sides"
        )
    return pairs


def _copy_of_head(checkpoint: Checkpoint) -> str | None:
    """The embeddings that the head is a copy of, if it is."""
    head = checkpoint.tensors[HEAD]
    for name, info in checkpoint.tensors.items():
        if name.endswith(EMBEDDINGS) and (info.dtype, info.shape) == (head.dtype, head.shape):
            chunks = zip(_chunks(checkpoint.bits(HEAD)), _chunks(checkpoint.bits(name)), strict=True)
            if all(np.array_equal(a, b) for a, b in chunks):
                return name
    return None


def merge(base: Folder, patches: Sequence[Patch | Folder], meta: Mapping[str, Any] | None = None) -> Patch:
    """One patch for several, each made on top of those before it, checked against the base's touched entries.

    Entries that come back to the base's bits are left out; `meta` is {"merged": [each one's]} unless given.
    Raises WrongBase, AlreadyApplied.
    """
    checkpoint = Checkpoint(base)
    chain = [_loaded(patch) for patch in patches]
    if not chain:
        raise PatchError("there is no patch to merge; give at least one")
    positions: dict[str, Array] = {}
    bits: dict[str, Array] = {}
    for i, patch in enumerate(chain):
        fresh: dict[str, Array] = {}
        for name, tensor in patch.tensors.items():
            fresh[name] = checkpoint.touched_bits(name, tensor)
            if name in positions:
                here = np.isin(tensor.positions, positions[name], assume_unique=True)
                fresh[name][here] = bits[name][np.searchsorted(positions[name], tensor.positions[here])]
        where = f"{base} with the first {i} of {len(chain)} patches" if i else str(base)
        if patch.state_of(fresh.__getitem__, where) == "applied":
            raise AlreadyApplied(f"{where}: already holds patch {i + 1}; leave it out")
        for name, tensor in patch.tensors.items():
            new = tensor.applied(fresh[name])
            positions[name], bits[name] = _overlaid(
                positions.get(name), bits.get(name), tensor.positions, new
            )
    tensors = {}
    for name, touched in positions.items():
        info = checkpoint.tensors[name]
        before = checkpoint.bits(name)[touched]
        tensors[name] = TensorPatch.from_bits(info.dtype, info.shape, touched, before, bits[name])
    merged = {"merged": [patch.meta for patch in chain]} if meta is None else dict(meta)
    return Patch(tensors, chain[0].base, merged)


def _overlaid(
    old_positions: Array | None, old_bits: Array | None, positions: Array, bits: Array
) -> tuple[Array, Array]:
    """Entries laid over older ones: ascending positions and the newest bits of each."""
    if old_positions is None or old_bits is None:
        return positions, bits
    both = np.concatenate([positions, old_positions])
    union, first = np.unique(both, return_index=True)  # the first of equals is the newer one
    return union, np.concatenate([bits, old_bits])[first]


def _loaded(patch: Patch | Folder) -> Patch:
    return patch if isinstance(patch, Patch) else Patch.load(patch)


# ------------------------------------------------------------------------------------------ changes


def apply(base: Folder, patch: Patch | Folder, out: Folder, *, force: bool = False) -> Verification:
    """Write `out`: the base with the patch, and every other file of its folder.

    `force` replaces an `out` that is an earlier checkpoint. Raises WrongBase, AlreadyApplied.
    """
    patch = _loaded(patch)
    writes = _writes(Checkpoint(base), patch, "apply")
    _write_folder(Path(base), writes, Path(out), force)
    return verify(out, patch)


def revert(trained: Folder, patch: Patch | Folder, out: Folder, *, force: bool = False) -> Verification:
    """Write `out`: the folder with the patch taken off again. Raises WrongBase, NotApplied."""
    patch = _loaded(patch)
    writes = _writes(Checkpoint(trained), patch, "revert")
    _write_folder(Path(trained), writes, Path(out), force)
    return verify(out, patch)


def apply_in_place(folder: Folder, patch: Patch | Folder) -> Verification:
    """Rewrite the touched bytes of a folder's own files, safe against a crash at any moment.

    A change that was interrupted before is taken back first. Raises WrongBase, AlreadyApplied.
    """
    return _change_in_place(Path(folder), _loaded(patch), "apply")


def revert_in_place(folder: Folder, patch: Patch | Folder) -> Verification:
    """Take the patch off a folder's own files, as `apply_in_place`. Raises WrongBase, NotApplied."""
    return _change_in_place(Path(folder), _loaded(patch), "revert")


def recover(folder: Folder) -> bool:
    """Take back a change in place that was interrupted; False when there was none."""
    with undo.locked(Path(folder)):
        return undo.recover_(Path(folder))


@dataclass(frozen=True)
class _Write:
    """New bits [N] for some entries of a tensor."""

    info: TensorInfo
    positions: Array
    old: Array
    new: Array


def _writes(checkpoint: Checkpoint, patch: Patch, direction: str) -> list[_Write]:
    """What a change has to write, all of it checked before anything is written."""
    state = checkpoint.state_of(patch)
    if patch.tensors and direction == "apply" and state == "applied":
        raise AlreadyApplied(f"{checkpoint.folder}: already holds the patch for {patch.base.name!r}")
    if patch.tensors and direction == "revert" and state == "base":
        raise NotApplied(
            f"{checkpoint.folder}: is the base {patch.base.name!r} itself; there is nothing to take off"
        )
    writes = []
    for name, tensor in patch.tensors.items():
        old = checkpoint.touched_bits(name, tensor)
        new = tensor.applied(old) if direction == "apply" else tensor.reverted(old)
        writes.append(_Write(checkpoint.tensors[name], tensor.positions, old, new))
    return writes


def _change_in_place(folder: Path, patch: Patch, direction: str) -> Verification:
    with undo.locked(folder):
        undo.recover_(folder)
        writes = _writes(Checkpoint(folder), patch, direction)
        for file in sorted({write.info.file for write in writes}):
            if file.is_symlink() or file.stat().st_nlink > 1:
                raise InputError(
                    f"{file}: is a link to a file that others share; apply the patch to a new folder instead"
                )
        records = [undo.Record(w.info.file.name, w.info.offset, w.positions, w.old) for w in writes]
        undo.write(folder, records)
        for write in writes:
            mapped = map_tensor(write.info, "r+")
            mapped[write.positions] = write.new
            mapped.flush()  # type: ignore[attr-defined]
        undo.finish(folder, records)
    return verify(folder, patch)


def _write_folder(source: Path, writes: Sequence[_Write], out: Path, force: bool) -> None:
    _check_output(source, out, force)
    sibling = out.with_name(f".{out.name}.{os.getpid()}.partial")
    aside = out.with_name(f".{out.name}.{os.getpid()}.old")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copytree(source, sibling, copy_function=shutil.copyfile)
        for write in writes:
            file = sibling / write.info.file.name
            info = TensorInfo(write.info.dtype, write.info.shape, file, write.info.offset, write.info.nbytes)
            mapped = map_tensor(info, "r+")
            mapped[write.positions] = write.new
            mapped.flush()  # type: ignore[attr-defined]
        for root, _, files in os.walk(sibling):
            for name in files:
                undo.sync_file(Path(root) / name)
            sync_folder(Path(root))
        if out.exists():
            os.rename(out, aside)
        try:
            os.rename(sibling, out)
        except OSError:
            if aside.exists():
                os.rename(aside, out)
            raise
        sync_folder(out.parent)
    finally:
        shutil.rmtree(sibling, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)


def _check_output(source: Path, out: Path, force: bool) -> None:
    ours, theirs = source.resolve(), out.resolve()
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        raise InputError(
            f"{out}: is, holds or lies within {source}; give another folder, or change it in place"
        )
    if not out.exists():
        return
    if not force:
        raise InputError(f"{out}: exists; give another folder, or --force to replace it")
    known = (SINGLE_FILE, INDEX_FILE, "config.json")
    if not out.is_dir() or (any(out.iterdir()) and not any((out / name).is_file() for name in known)):
        raise InputError(
            f"{out}: is not a checkpoint's folder, so --force does not replace it; remove it yourself"
        )
