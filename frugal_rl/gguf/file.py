"""The container: a GGUF file's header read without its tensors, and files written whole or not at all.

All is little-endian. "GGUF", version 3 (2 is the same), the counts of tensors and of keys; for each key its
name, a type and its value; for each tensor its name, its sizes (the fastest first), its format and where
it begins, counted from the first multiple of `general.alignment` (32) behind the header.

Invariants: nothing that a header claims is believed before it was compared with the file's size. Arrays are
passed over, not read: a vocabulary is no concern of what changes weights.

Source: ggml-org/ggml docs/gguf.md. Differs: own reader and writer, because the `gguf` package reads a
vocabulary of 152 k entries for seconds and holds every tensor while it writes; tests hold both to it.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..patch import sync_folder
from .formats import BY_CODE, Format

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING, ARRAY = 8, 9
U32, I32, F32, BOOL = 4, 5, 6, 7
MOST_DEPTH = 4  # of arrays of arrays: none is known

Array = npt.NDArray[Any]
Value = bool | int | float | str
Metadata = dict[str, tuple[int, Any]]  # a type (of SCALARS, or STRING) and a value; a list is an array of it


@dataclass(frozen=True)
class GgufTensor:
    """`shape` as the checkpoint has it, the slowest first; `offset` and bytes are of the file."""

    name: str
    shape: tuple[int, ...]
    code: int
    offset: int

    @property
    def form(self) -> Format | None:
        """None for a format that is not read here."""
        return BY_CODE.get(self.code)


@dataclass(frozen=True)
class Gguf:
    """The header of a file. `metadata` has the keys with a single value. Raises InputError (`read`)."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]

    @classmethod
    def read(cls, path: Path) -> Gguf:
        try:
            with open(path, "rb") as file:
                if file.read(4) != MAGIC:
                    raise InputError(f"{path}: is no GGUF file: it does not begin with GGUF")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                    return _Header(path, mapped).gguf()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); give a GGUF file") from error

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def blocks(self, tensor: GgufTensor, mode: str) -> Array:
        """A map ("r" or "r+") of a tensor's blocks, uint8 [N, block_bytes]."""
        form = tensor.form
        assert form is not None, "what is not read here is refused before"
        count = math.prod(tensor.shape) // form.block
        return np.memmap(self.path, np.uint8, mode, tensor.offset, (count, form.block_bytes))  # type: ignore[call-overload]


class _Header:
    """A cursor over a file's bytes."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, len(MAGIC)

    def damaged(self, what: str) -> InputError:
        return InputError(f"{self.path}: is no whole GGUF file: {what}; fetch it again")

    def gguf(self) -> Gguf:
        version = self.number("<I")
        if version not in VERSIONS:
            raise InputError(f"{self.path}: is GGUF of version {version}; expected 2 or 3, little-endian")
        tensors, keys = self.number("<Q"), self.number("<Q")
        metadata = {}
        for _ in range(keys):
            name, kind = self.text(), self.number("<I")
            value = self.value(kind, 0)
            if value is not None:
                metadata[name] = value
        rows = [self._row() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment % 8:
            raise self.damaged(f"its alignment is {alignment!r}")
        start = -(-self.at // alignment) * alignment
        found = {}
        for name, shape, code, offset in rows:
            tensor = GgufTensor(name, shape, code, start + offset)
            form = tensor.form
            if form is not None:
                if shape[-1] % form.block:
                    raise self.damaged(f"{name} is {form.name} with rows of {shape[-1]} entries")
                if tensor.offset + form.nbytes(math.prod(shape)) > len(self.data):
                    raise self.damaged(f"it has {len(self.data)} bytes, and {name} would end beyond them")
            found[name] = tensor
        if len(found) != len(rows):
            raise self.damaged("two tensors have one name")
        return Gguf(self.path, metadata, found)

    def _row(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.text(), self.number("<I")
        if not 1 <= dimensions <= 4:
            raise self.damaged(f"{name[:100]} has {dimensions} dimensions")
        shape = tuple(reversed([self.number("<Q") for _ in range(dimensions)]))
        if not 0 < math.prod(shape) < 2**48:
            raise self.damaged(f"{name[:100]} has the shape {list(shape)}")
        return name, shape, self.number("<I"), self.number("<Q")

    def number(self, kind: str) -> Any:
        size = struct.calcsize(kind)
        self._need(size)
        (value,) = struct.unpack_from(kind, self.data, self.at)
        self.at += size
        return value

    def text(self) -> str:
        size = self.number("<Q")
        self._need(size)
        data = self.data[self.at : self.at + size]
        self.at += size
        return data.decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int) -> Value | None:
        """A single value; None for an array, which is passed over."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY or depth > MOST_DEPTH:
            raise self.damaged(f"a value has the type {kind}")
        item, count = self.number("<I"), self.number("<Q")
        if item in SCALARS:
            size = struct.calcsize(SCALARS[item]) * count
            self._need(size)
            self.at += size
        else:
            for _ in range(count):
                if item == STRING:
                    size = self.number("<Q")
                    self._need(size)
                    self.at += size
                else:
                    self.value(item, depth + 1)
        return None

    def _need(self, size: int) -> None:
        if self.at + size > len(self.data):
            raise self.damaged(f"its header goes on beyond its {len(self.data)} bytes")


@dataclass(frozen=True)
class Planned:
    """A tensor to write: its bytes come from `chunks`, uint8 arrays in order."""

    name: str
    shape: tuple[int, ...]
    form: Format
    chunks: Iterable[Array]


def write(path: Path, metadata: Metadata, tensors: Sequence[Planned]) -> int:
    """Write the file: a sibling, synced, then renamed. Returns its bytes."""
    sibling = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(sibling, "wb") as file:
            file.write(_header(metadata, tensors))
            for tensor in tensors:
                file.write(bytes(-file.tell() % ALIGNMENT))
                begin = file.tell()
                for chunk in tensor.chunks:
                    file.write(np.ascontiguousarray(chunk).data)
                written, expected = file.tell() - begin, tensor.form.nbytes(math.prod(tensor.shape))
                assert written == expected, f"{tensor.name}: {written} bytes, expected {expected}"
            file.write(bytes(-file.tell() % ALIGNMENT))
            total = file.tell()
            file.flush()
            os.fsync(file.fileno())
        os.replace(sibling, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            sibling.unlink()
        raise
    sync_folder(path.parent)
    return total


def _header(metadata: Metadata, tensors: Sequence[Planned]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata))]
    for name, (kind, value) in metadata.items():
        parts.append(_text(name))
        if isinstance(value, list):
            parts.append(struct.pack("<IIQ", ARRAY, kind, len(value)))
            parts += [_single(kind, item) for item in value]
        else:
            parts += [struct.pack("<I", kind), _single(kind, value)]
    offset = 0
    for tensor in tensors:
        sizes = tensor.shape[::-1]
        parts += [_text(tensor.name), struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)]
        parts.append(struct.pack("<IQ", tensor.form.code, offset))
        offset += -(-tensor.form.nbytes(math.prod(tensor.shape)) // ALIGNMENT) * ALIGNMENT
    return b"".join(parts)


def _single(kind: int, value: Any) -> bytes:
    return _text(value) if kind == STRING else struct.pack(SCALARS[kind], value)


def _text(value: str) -> bytes:
    data = value.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def is_gguf(path: Path) -> bool:
    """Whether this names a file that begins as GGUF does, or would be one."""
    if path.suffix == ".gguf":
        return not path.is_dir()
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            return file.read(4) == MAGIC
    except OSError:  # not to be read: whoever wants it says so
        return False


def spans(length: int, step: int) -> Iterator[tuple[int, int]]:
    """[0, length) in pieces of `step`."""
    for start in range(0, length, step):
        yield start, min(start + step, length)
