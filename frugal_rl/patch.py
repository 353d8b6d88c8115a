"""A patch: the entries that turn one set of weights into another, bit for bit, and back.

Law. Bits are unsigned integers of the item's width w, so that a change by one ULP is +1 or -1:
    difference = (after - before) mod 2**w      apply: before + difference
                                                revert: after - difference
Invariants. Positions ascend strictly; no difference is 0; no tensor is empty; equal patches are
equal files (for one version of zstandard; what it cannot shrink is stored as it is). Hashes of the
touched entries before and after tell a base, a patched base and a stranger apart without reading
anything else. A file cannot lie about sizes: every entry costs one bit of `signs`, which is never
compressed, so n bytes are at most 8 n entries; this is checked before anything is allocated.

The file, "frugal_rl patch 1", is a safetensors file of U8 streams. All is little-endian; bit i of
packed bits is bit i % 8 of byte i // 8, the last byte filled up with 0. H is blake2b of 16 bytes.
JSON is canonical: sorted keys, no spaces, ASCII. The header's `__metadata__` holds
    format    "frugal_rl patch 1"
    base      JSON {"fingerprint": hex or null, "name": string, "untouched": [names of tensors]}
    meta      JSON object, free (recipe, metrics)
    tensors   JSON {name: [dtype, shape, entries, order]}, the touched tensors
    streams   JSON {name: hex of H(the stored bytes)}
    checksum  hex of H(the header with its padding, these 32 digits being "0")
and the header is padded with spaces to 8 bytes. Tensors come in the order of their names, wherever
they are listed; streams too, and those of no bytes are left out. A stream NAME may be stored as
NAME.zst, one zstandard frame; `hashes` and `signs` never are.
    hashes    16 bytes each: the fingerprint of every tensor of the base, touched or not (none when
              the base's fingerprint is null), then before and after of each touched tensor
    signs     a bit for each entry: its difference, as a signed integer, is negative
    more      a bit for each entry: its size = |difference| - 1 is not 0 (it is for one ULP)
    lengths.* four bits for each size that is not 0: L % 16 in lengths.low, L // 16 in lengths.high
              (left out when all are 0), where L is the number of bits of the size
    sizes     for L = 2, 3, ...: of each size of L bits all but the highest, lowest bit first;
              each L fills up its last byte
    gaps.*    for each tensor p[0], p[1] - p[0] - 1, p[2] - p[1] - 1, ... of its listed positions p:
              the changed ones or, where these are more than half of the entries, all others.
              Positions are flat in rows or, where order is "columns", row + column * rows of the
              tensor as a matrix [shape[0], everything else]. The gaps v of all tensors follow each
              other in blocks of 128, the last block filled up with zeros:
    gaps.k    a byte k for each block: k < 128 is Rice; else plain, of k - 128 bits
    gaps.low  for each block its lowest k (k - 128) bits as planes of 16 bytes, lowest bit first
    gaps.high for each gap of a Rice block, without the filling, min(v >> k, 20) bits 0 and a bit 1
    gaps.big  v itself as uint64 where that minimum is 20
Hash of touched entries: H(b"BF16 2,3\\n" [dtype, space, shape, newline] + int64 positions + bits).
Fingerprint of a tensor: H(b"BF16 2,3\\n" + its bytes); of a base: H(for each tensor: its name as
a JSON string + the 16 bytes of its fingerprint).

Differs: TRL and slime ship int32 positions and new values (6 bytes an entry, not reversible);
a float difference would not be exact. Columns are tried because changes gather in columns.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from frugal_rl.codes import (
    CodeError,
    Stream,
    bit_length,
    decode_gaps,
    decode_sizes,
    encode_gaps,
    encode_sizes,
)
from frugal_rl.container import (
    FORMAT,
    HASH_BYTES,
    MAX_HEADER_BYTES,
    Container,
    DamagedPatch,
    PatchError,
    dump,
    pack,
    some,
)

__all__ = [
    "BITS", "FORMAT", "AlreadyApplied", "BaseInfo", "DamagedPatch", "NotApplied", "Patch",
    "PatchError", "PatchHeader", "TensorHeader", "TensorPatch", "WrongBase",
]  # fmt: skip

_BYTE = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL")
BITS: dict[str, np.dtype[Any]] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), np.dtype("<u8")),
    **dict.fromkeys(("F32", "I32", "U32"), np.dtype("<u4")),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), np.dtype("<u2")),
    **dict.fromkeys(_BYTE, np.dtype("u1")),
}
"""The unsigned integers that hold the bits of each dtype of safetensors with whole bytes."""

MAX_ENTRIES_OF_A_TENSOR = 2**48  # sums of positions stay far below 2**63
PLAIN = ("hashes", "signs")
STREAMS = (
    *PLAIN,
    *("more", "lengths.low", "lengths.high", "sizes"),
    *("gaps.k", "gaps.low", "gaps.high", "gaps.big"),
)
KEYS = ("base", "meta", "tensors")

Array = npt.NDArray[Any]


class WrongBase(PatchError):
    """The weights are neither the patch's base nor the patched base; `tensors` names which."""

    def __init__(self, message: str, tensors: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.tensors = tuple(tensors)


class AlreadyApplied(PatchError):
    """The weights already hold the patch."""


class NotApplied(PatchError):
    """The weights are the patch's base: there is nothing to take off."""


# ------------------------------------------------------------------------------------------ content


def _tag(dtype: str, shape: Sequence[int]) -> bytes:
    return f"{dtype} {','.join(map(str, shape))}\n".encode()


def hash_of_entries(dtype: str, shape: Sequence[int], positions_N: Array, *bits_N: Array) -> list[bytes]:
    """The hash of the same entries for each of the given bits."""
    common = blake2b(_tag(dtype, shape), digest_size=HASH_BYTES)
    common.update(np.ascontiguousarray(positions_N, "<i8").data)
    digests = []
    for bits in bits_N:
        one = common.copy()
        one.update(np.ascontiguousarray(bits, BITS[dtype]).data)
        digests.append(one.digest())
    return digests


def fingerprint_of_tensor(dtype: str, shape: Sequence[int], chunks: Iterable[Array]) -> str:
    """The fingerprint of a whole tensor, given its bits in any number of pieces."""
    state = blake2b(_tag(dtype, shape), digest_size=HASH_BYTES)
    for chunk in chunks:
        state.update(np.ascontiguousarray(chunk).data)
    return state.hexdigest()


@dataclass(frozen=True)
class BaseInfo:
    """The weights that a patch is made for, with a fingerprint for each of their tensors.

    Without fingerprints (a step of a run, say) only the touched entries can be recognised.
    """

    name: str
    fingerprints: Mapping[str, str]

    def __post_init__(self) -> None:
        for tensor, digest in self.fingerprints.items():
            if not re.fullmatch(f"[0-9a-f]{{{2 * HASH_BYTES}}}", digest):
                raise PatchError(f"{tensor}: fingerprint is {digest!r}, expected 32 hex digits")

    @property
    def fingerprint(self) -> str | None:
        """One fingerprint for all tensors; None when theirs are unknown."""
        if not self.fingerprints:
            return None
        state = blake2b(digest_size=HASH_BYTES)
        for name in sorted(self.fingerprints):
            state.update(dump(name).encode() + bytes.fromhex(self.fingerprints[name]))
        return state.hexdigest()


@dataclass(frozen=True, eq=False)
class TensorPatch:
    """The changed entries of one tensor. The arrays are [N] and become read-only."""

    dtype: str
    shape: tuple[int, ...]
    positions: npt.NDArray[np.int64]
    difference: Array
    before_hash: bytes
    after_hash: bytes

    def __post_init__(self) -> None:
        entries, positions, difference = math.prod(self.shape), self.positions, self.difference
        _check_row(self.dtype, self.shape, len(positions), PatchError, "a tensor's patch")
        if positions.dtype != np.int64 or positions.ndim != 1:
            raise PatchError(f"positions are {positions.dtype} {positions.shape}, expected int64 [N]")
        if difference.dtype != BITS[self.dtype] or difference.shape != positions.shape:
            got = f"{difference.dtype} {difference.shape}"
            raise PatchError(f"differences are {got}, expected {BITS[self.dtype]} {positions.shape}")
        if len(positions):
            if positions[0] < 0 or positions[-1] >= entries or not (positions[1:] > positions[:-1]).all():
                raise PatchError(f"positions do not ascend strictly within 0 to {entries - 1}")
            if not difference.all():
                raise PatchError("a difference is 0; leave out the entries that did not change")
        positions.flags.writeable = False
        difference.flags.writeable = False

    @classmethod
    def from_bits(
        cls,
        dtype: str,
        shape: Sequence[int],
        positions: Array,
        before_bits: Array,
        after_bits: Array,
    ) -> TensorPatch:
        """From the bits of entries before and after, [N]; those that are equal are left out."""
        if dtype not in BITS:
            raise PatchError(f"dtype {dtype!r} is not supported; supported are {', '.join(BITS)}")
        unsigned = BITS[dtype]
        before, after = (np.asarray(bits) for bits in (before_bits, after_bits))
        for bits in (before, after):
            if bits.dtype.itemsize != unsigned.itemsize or bits.shape != np.shape(positions):
                got = f"{bits.dtype} {bits.shape}"
                raise PatchError(f"bits are {got}, expected {unsigned} {np.shape(positions)} for {dtype}")
        before, after = (np.ascontiguousarray(bits).view(unsigned) for bits in (before, after))
        changed = before != after
        kept = np.asarray(positions).astype(np.int64)
        if not changed.all():
            kept, before, after = kept[changed], before[changed], after[changed]
        hashes = hash_of_entries(dtype, shape, kept, before, after)
        return cls(dtype, tuple(int(s) for s in shape), kept, after - before, *hashes)

    def __len__(self) -> int:
        return len(self.positions)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorPatch):
            return NotImplemented
        return (
            (self.dtype, self.shape, self.before_hash, self.after_hash)
            == (other.dtype, other.shape, other.before_hash, other.after_hash)
            and np.array_equal(self.positions, other.positions)
            and np.array_equal(self.difference, other.difference)
        )

    __hash__ = None  # type: ignore[assignment]

    def state_of(self, bits_N: Array) -> str:
        """What the touched entries of some weights are: "base", "applied" or "neither"."""
        (digest,) = hash_of_entries(self.dtype, self.shape, self.positions, bits_N)
        return {self.after_hash: "applied", self.before_hash: "base"}.get(digest, "neither")

    def applied(self, before_N: Array) -> Array:
        """The touched entries after the patch. Raises DamagedPatch when they miss their hash."""
        return self._checked(before_N + self.difference, self.after_hash)

    def reverted(self, after_N: Array) -> Array:
        """The touched entries before the patch. Raises DamagedPatch when they miss their hash."""
        return self._checked(after_N - self.difference, self.before_hash)

    def _checked(self, bits_N: Array, expected: bytes) -> Array:
        if hash_of_entries(self.dtype, self.shape, self.positions, bits_N) != [expected]:
            raise DamagedPatch(
                "the patch's differences do not lead to the bits that it was made from; "
                "the patch is damaged: fetch it again"
            )
        return bits_N


@dataclass(frozen=True)
class TensorHeader:
    """A row of the file's table."""

    dtype: str
    shape: tuple[int, ...]
    entries: int
    order: str


@dataclass(frozen=True)
class PatchHeader:
    """What a file says of itself without its streams being read."""

    format: str
    base_name: str
    base_fingerprint: str | None
    untouched: tuple[str, ...]
    tensors: dict[str, TensorHeader]
    meta: dict[str, Any]
    file_bytes: int
    stream_bytes: int

    @property
    def entries(self) -> int:
        return sum(row.entries for row in self.tensors.values())


@dataclass(frozen=True)
class Patch:
    """Patches of tensors by name, their base, and free JSON. Unchanged tensors are left out."""

    tensors: dict[str, TensorPatch]
    base: BaseInfo
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kept = {name: self.tensors[name] for name in sorted(self.tensors) if len(self.tensors[name])}
        object.__setattr__(self, "tensors", kept)
        unknown = sorted(set(kept) - set(self.base.fingerprints)) if self.base.fingerprints else []
        if unknown:
            raise PatchError(f"the base {self.base.name!r} has no tensor {some(unknown)}")
        try:
            object.__setattr__(self, "meta", json.loads(dump(dict(self.meta))))
        except (TypeError, ValueError, RecursionError) as error:  # no JSON: a NaN, a tensor, a loop
            raise PatchError(f"the patch's meta cannot be written as JSON: {error}") from error

    @property
    def entries(self) -> int:
        """How many entries change, over all tensors."""
        return sum(len(tensor) for tensor in self.tensors.values())

    def state_of(self, touched_bits: Callable[[str], Array], where: str) -> str:
        """Whether some weights are the "base" or have the patch "applied"; an empty patch says base.

        `touched_bits` gives the bits [N] of a tensor's touched entries. Raises WrongBase.
        """
        states = {name: tensor.state_of(touched_bits(name)) for name, tensor in self.tensors.items()}
        if not self.tensors or set(states.values()) == {"base"}:
            return "base"
        if set(states.values()) == {"applied"}:
            return "applied"
        wrong = [name for name, state in states.items() if state == "neither"]
        base = f"the base {self.base.name!r} (fingerprint {self.base.fingerprint or 'unknown'})"
        if wrong:
            raise WrongBase(
                f"{where}: is neither {base} nor that base with the patch: touched entries of "
                f"{some(wrong)} differ; use the weights that the patch was made from",
                wrong,
            )
        applied = [name for name, state in states.items() if state == "applied"]
        raise WrongBase(
            f"{where}: holds the patch in {some(applied)} but not in all of its "
            f"{len(states)} tensors; use {base}, whole",
            applied,
        )

    def encode(self) -> bytes:
        """The bytes of the file."""
        return _encode(self)

    @classmethod
    def decode(cls, data: bytes, where: str = "the patch") -> Patch:
        """From the bytes of a file; `where` names it in errors. Raises PatchError, DamagedPatch."""
        return _decode(data, where)

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the file whole or not at all: a sibling, synced, then renamed. Returns its bytes."""
        data = self.encode()
        write_atomically(Path(path), data)
        return len(data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Patch:
        """Raises DamagedPatch; PatchError when there is no such file or it has another format."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise PatchError(f"{path}: cannot be read ({error.strerror}); give a patch file") from error
        return cls.decode(data, str(path))

    @staticmethod
    def header(path: str | os.PathLike[str]) -> PatchHeader:
        """What the file holds, by its checked header alone: the streams are not read."""
        try:
            with open(path, "rb") as file:
                start = file.read(8)
                size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
                start += file.read(size if size <= MAX_HEADER_BYTES else 0)
                return _read_header(
                    Container(start, os.fstat(file.fileno()).st_size, str(path), KEYS, STREAMS)
                )
        except OSError as error:
            raise PatchError(f"{path}: cannot be read ({error.strerror}); give a patch file") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a crash at any moment leaves the old file or the new one."""
    sibling = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(sibling, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(sibling, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            sibling.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------- positions


def _listed(tensor: TensorPatch) -> Array:
    """The positions to write: the changed ones or, where these are more, the others."""
    entries = math.prod(tensor.shape)
    if 2 * len(tensor) <= entries:
        return tensor.positions
    others = np.ones(entries, bool)
    others[tensor.positions] = False
    return np.flatnonzero(others)


def _transposed(positions: Array, rows: int, columns: int) -> Array:
    """Positions in a [rows, columns] matrix as ascending positions in its transpose."""
    row, column = np.divmod(positions, columns)
    return np.sort(column * rows + row)


def _between(listed: Array) -> Array:
    """p[0], p[1] - p[0] - 1, p[2] - p[1] - 1, ..."""
    gaps = listed.copy()
    gaps[1:] -= listed[:-1] + 1
    return gaps.view(np.uint64)


def _gaps(tensor: TensorPatch) -> tuple[str, Array]:
    """The order that costs less, and the gaps between listed positions in it."""
    listed = _listed(tensor)
    gaps = _between(listed)
    rows = tensor.shape[0] if tensor.shape else 1
    columns = math.prod(tensor.shape[1:])
    if rows < 2 or columns < 2 or len(listed) < 2:
        return "rows", gaps
    other = _between(_transposed(listed, rows, columns))
    # Sums of integers, so the same choice everywhere; 1/32 less to be worth the sorting.
    if 32 * int(bit_length(other).sum()) < 31 * int(bit_length(gaps).sum()):
        return "columns", other
    return "rows", gaps


def _positions(row: TensorHeader, gaps: Array, container: Container, name: str) -> Array:
    """The changed positions of a tensor, from its gaps."""
    entries = math.prod(row.shape)
    if len(gaps) and int(gaps.max()) >= entries:
        raise container.damaged(f"a gap of {name} is {int(gaps.max())}, the tensor has {entries} entries")
    listed = np.cumsum(gaps.astype(np.int64) + 1) - 1  # cannot wrap around: it would pass `entries` first
    if len(listed) and (int(listed.max()) >= entries or int(listed.min()) < 0):
        raise container.damaged(f"a position of {name} is beyond its {entries} entries")
    if row.order == "columns":
        rows = row.shape[0]
        listed = _transposed(listed, entries // rows, rows)
    if 2 * row.entries <= entries:
        return listed
    changed = np.ones(entries, bool)
    changed[listed] = False
    return np.flatnonzero(changed)


# ----------------------------------------------------------------------------------------- the file


def _check_row(
    dtype: object, shape: Sequence[object], count: object, error: type[PatchError], where: str
) -> None:
    """A dtype, shape and count that can be those of a tensor and its changed entries."""
    if not isinstance(dtype, str) or dtype not in BITS:
        raise error(f"{where}: dtype is {str(dtype)[:50]!r}, expected one of {', '.join(BITS)}")
    sizes = [size for size in shape if type(size) is int and size >= 0]
    if len(sizes) < len(shape) or len(shape) > 64 or type(count) is not int:
        raise error(f"{where}: shape is {str(shape)[:200]}, expected at most 64 sizes")
    if not 0 <= count <= math.prod(sizes) <= MAX_ENTRIES_OF_A_TENSOR:
        raise error(f"{where}: {count} changed entries in shape {str(shape)[:200]}")


def _encode(patch: Patch) -> bytes:
    tensors, fingerprints = patch.tensors, patch.base.fingerprints
    table, gaps, negative, sizes = {}, [], [], []
    hashes = [bytes.fromhex(fingerprints[name]) for name in sorted(fingerprints)]
    for name, tensor in tensors.items():
        order, ours = _gaps(tensor)
        table[name] = [tensor.dtype, tensor.shape, len(tensor), order]
        gaps.append(ours)
        signed = tensor.difference.view(f"<i{tensor.difference.itemsize}")
        negative.append(signed < 0)
        sizes.append(np.where(signed < 0, ~signed, signed - 1).astype(np.uint64))
        hashes += [tensor.before_hash, tensor.after_hash]
    base = {
        "name": patch.base.name,
        "fingerprint": patch.base.fingerprint,
        "untouched": sorted(set(fingerprints) - set(tensors)),
    }
    streams = {"hashes": b"".join(hashes)}
    if tensors:
        streams["signs"] = np.packbits(np.concatenate(negative), bitorder="little").tobytes()
        streams.update(encode_gaps(np.concatenate(gaps)))
        streams.update(encode_sizes(np.concatenate(sizes)))
    return pack({"base": base, "meta": patch.meta, "tensors": table}, streams, PLAIN)


def _read_header(container: Container) -> PatchHeader:
    base, table = container.metadata["base"], container.metadata["tensors"]
    name, fingerprint, untouched = (base.get(key) for key in ("name", "fingerprint", "untouched"))
    if (
        len(base) != 3
        or not isinstance(name, str)
        or not (isinstance(untouched, list) and all(isinstance(one, str) for one in untouched))
        or not (isinstance(fingerprint, str) or (fingerprint is None and not untouched))
        or sorted(set(untouched) - set(table)) != untouched
    ):
        raise container.damaged("its description of the base is not one")
    tensors = {}
    for key, row in table.items():
        if not (isinstance(row, list) and len(row) == 4 and isinstance(row[1], list)):
            raise container.damaged(f"tensor {key[:200]} is described by {str(row)[:200]}")
        dtype, shape, entries, order = row
        _check_row(dtype, shape, entries, DamagedPatch, f"{container.where}: tensor {key[:200]}")
        if entries == 0 or order not in ("rows", "columns") or (order == "columns" and not shape):
            raise container.damaged(f"tensor {key[:200]} is described by {str(row)[:200]}")
        tensors[key] = TensorHeader(dtype, tuple(shape), entries, order)
    return PatchHeader(
        format=FORMAT,
        base_name=name,
        base_fingerprint=fingerprint,
        untouched=tuple(untouched),
        tensors=tensors,
        meta=container.metadata["meta"],
        file_bytes=container.file_bytes,
        stream_bytes=container.file_bytes - container.start,
    )


def _decode(data: bytes, where: str) -> Patch:
    container = Container(data, len(data), where, KEYS, STREAMS)
    header = _read_header(container)
    known = sorted({*header.untouched, *header.tensors}) if header.base_fingerprint else []
    size = HASH_BYTES * (len(known) + 2 * len(header.tensors))
    packed = container.stream("hashes", size, size)
    hashes = [packed[i : i + HASH_BYTES] for i in range(0, size, HASH_BYTES)]
    fingerprints = {name: digest.hex() for name, digest in zip(known, hashes, strict=False)}
    base = BaseInfo(header.base_name, fingerprints)
    if base.fingerprint != header.base_fingerprint:
        raise container.damaged("the base's fingerprint is not that of its tensors")
    size = -(-header.entries // 8)
    packed = container.stream("signs", size, size)
    # Only from here on is the number of entries known to be honest.
    negative = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little").view(bool)
    if negative[header.entries :].any():
        raise container.damaged("stream signs holds more bits than there are entries")
    listed = [min(row.entries, math.prod(row.shape) - row.entries) for row in header.tensors.values()]
    gaps = np.split(_integers(container, decode_gaps, sum(listed)), np.cumsum(listed))
    sizes = _integers(container, decode_sizes, header.entries)
    tensors, first = {}, 0
    for i, (name, row) in enumerate(header.tensors.items()):
        here = slice(first, first + row.entries)
        first += row.entries
        difference = _differences(BITS[row.dtype], sizes[here], negative[here])
        if difference is None:
            raise container.damaged(f"a difference of {name} is 0 or wider than {row.dtype}")
        positions = _positions(row, gaps[i], container, name)
        before, after = hashes[len(known) + 2 * i :][:2]
        tensors[name] = TensorPatch(row.dtype, row.shape, positions, difference, before, after)
    return Patch(tensors, base, header.meta)


def _integers(container: Container, decode: Callable[[Stream, int], Array], count: int) -> Array:
    try:
        return decode(container.stream, count)
    except CodeError as error:
        raise container.damaged(str(error)) from None


def _differences(bits: np.dtype[Any], sizes: Array, negative: Array) -> Array | None:
    """Unsigned differences from |difference| - 1 and signs; None when one does not fit or is 0."""
    most = np.uint64((1 << (8 * bits.itemsize - 1)) - 1)
    if (sizes > most).any() or (sizes[~negative] == most).any():
        return None
    return np.where(negative, ~sizes, sizes + np.uint64(1)).astype(bits)
