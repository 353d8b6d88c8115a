"""The file of a patch: a safetensors file of checked byte streams, some of them compressed.

Laws: unpacking what was packed gives the same metadata and streams; equal content is equal bytes.
Invariants: no byte of a file changes unnoticed: `checksum` covers the header, the header's hashes
cover the streams. A header that `pack` would not write is refused, so a file has one form.
No stream is decompressed before its size was compared with what its reader allows.
The format is specified in `patch.py`.

Source: https://github.com/huggingface/safetensors, README ("Format").
Differs: stricter than safetensors (canonical JSON, streams in the order of their names), whose own
readers read these files.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping
from hashlib import blake2b
from typing import Any

import zstandard

from frugal_rl.errors import InputError

FORMAT = "frugal_rl patch 1"
MAX_HEADER_BYTES = 100_000_000  # safetensors refuses longer headers too
HASH_BYTES = 16
# Higher levels look for repetitions that are not there: slower, and often larger.
ZSTD_LEVEL = 1


class PatchError(InputError):
    """A patch cannot be read, made, or used on these weights."""


class DamagedPatch(PatchError):
    """The file or its content is not what was written."""


def dump(value: Any) -> str:
    """JSON in its one form. Raises TypeError, ValueError or RecursionError for what has none."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def some(names: Collection[str]) -> str:
    """The first names of a list, for a message."""
    first = list(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def pack(metadata: Mapping[str, Any], streams: Mapping[str, bytes], plain: Collection[str]) -> bytes:
    """The bytes of a file. Streams named in `plain` are not compressed; empty ones are left out."""
    stored = dict((name, data) if name in plain else _squeezed(name, data) for name, data in streams.items())
    stored = {name: stored[name] for name in sorted(stored) if stored[name]}
    layout, end = {}, 0
    for name, data in stored.items():
        begin, end = end, end + len(data)
        layout[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [begin, end]}
    texts = {key: dump(value) for key, value in metadata.items()}
    texts["format"] = FORMAT
    texts["streams"] = dump({name: _hash(data) for name, data in stored.items()})
    checksum = _hash(_header_bytes(texts, layout, "0" * 2 * HASH_BYTES))
    header = _header_bytes(texts, layout, checksum)
    return b"".join([struct.pack("<Q", len(header)), header, *stored.values()])


def _squeezed(name: str, data: bytes) -> tuple[str, bytes]:
    """The stream by zstandard where that is smaller, as it is elsewhere."""
    frame = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True).compress(data)
    return (f"{name}.zst", frame) if len(frame) < len(data) else (name, data)


def _hash(data: bytes) -> str:
    return blake2b(data, digest_size=HASH_BYTES).hexdigest()


def _header_bytes(texts: Mapping[str, str], layout: Mapping[str, Any], checksum: str) -> bytes:
    header = dump({"__metadata__": {**texts, "checksum": checksum}, **layout}).encode()
    return header + b" " * (-len(header) % 8)


class Container:
    """A file of `file_bytes` bytes, of which `data` holds at least the header. Raises PatchError.

    `metadata` is the parsed JSON of the keys that were packed; `stream` needs all of the data.
    """

    def __init__(
        self,
        data: bytes,
        file_bytes: int,
        where: str,
        keys: Collection[str],
        names: Collection[str],
    ) -> None:
        self.data, self.file_bytes, self.where = data, file_bytes, where
        size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
        if size > min(MAX_HEADER_BYTES, file_bytes - 8) or not size:
            raise self.damaged(f"it has {file_bytes} bytes and its header claims {size} of them")
        self.start = 8 + size
        raw = data[8 : self.start]
        layout = self._parsed(raw)
        texts = layout.pop("__metadata__", None)
        self._check_format(texts)
        if sorted(texts) != sorted([*keys, "checksum", "format", "streams"]) or not all(
            isinstance(text, str) for text in texts.values()
        ):
            raise self.damaged(f"its metadata holds {some(sorted(texts))}")
        checksum = texts.pop("checksum")
        if raw != _header_bytes(texts, layout, checksum):
            raise self.damaged("its header is not in canonical form")
        if checksum != _hash(_header_bytes(texts, layout, "0" * 2 * HASH_BYTES)):
            raise self.damaged("its header does not match its checksum")
        self.layout = self._layout(layout, names)
        self.digests = self._parsed(texts["streams"])
        if list(self.digests) != list(self.layout):
            raise self.damaged("its list of hashes is not that of its streams")
        self.metadata = {key: self._parsed(texts[key]) for key in keys}

    def damaged(self, got: str) -> DamagedPatch:
        return DamagedPatch(f"{self.where}: is damaged: {got}; fetch or write the file again")

    def _check_format(self, texts: Any) -> None:
        found = texts.get("format") if isinstance(texts, dict) else None
        if found != FORMAT:
            got = f"is {found!r}" if found else "is no patch (its metadata names no format)"
            raise PatchError(
                f"{self.where}: {got[:200]}, expected {FORMAT!r}; "
                "give a patch file, or use the version of frugal_rl that wrote this one"
            )

    def _parsed(self, text: bytes | str) -> dict[str, Any]:
        try:
            value = json.loads(text if isinstance(text, str) else text.decode("ascii"))
            canonical = dump(value) == text or isinstance(text, bytes)  # `text` may be another's file
        except (ValueError, RecursionError) as error:
            # Not ASCII, not JSON, NaN, 1e999, a number of thousands of digits, or nested too deep.
            raise self.damaged(f"its header is no JSON ({error})") from None
        if not canonical or not isinstance(value, dict):
            raise self.damaged("its header holds JSON that is not in canonical form")
        return value

    def _layout(self, layout: dict[str, Any], names: Collection[str]) -> dict[str, tuple[int, int]]:
        known = {*names, *(f"{name}.zst" for name in names)}
        spans, end = {}, 0
        for name, info in layout.items():
            begin, last = end, _end_of(info, end)
            if last is None or name not in known or name.removesuffix(".zst") in spans:
                raise self.damaged(f"stream {name[:50]!r} is described by {str(info)[:200]}")
            spans[name] = (begin, last)
            end = last
        if self.start + end != self.file_bytes:
            raise self.damaged(f"it has {self.file_bytes} bytes, its header says {self.start + end}")
        return spans

    def stream(self, name: str, least: int, most: int) -> bytes:
        """A stream's bytes, none where it is left out. Its size must be within the two limits."""
        stored = name if name in self.layout else f"{name}.zst"
        begin, end = self.layout.get(stored, (0, 0))
        data = self.data[self.start + begin : self.start + end]
        if data and _hash(data) != self.digests[stored]:
            raise self.damaged(f"stream {name} does not match its hash")
        try:
            compressed = bool(data) and stored != name
            size = zstandard.frame_content_size(data) if compressed else len(data)
            if not least <= size <= most:
                raise self.damaged(f"stream {name} has {size} bytes, expected {least} to {most}")
            return _unsqueezed(data, size) if compressed else data
        except zstandard.ZstdError as error:
            raise self.damaged(f"stream {name} is no zstandard frame ({error})") from None


def _unsqueezed(frame: bytes, size: int) -> bytes:
    data = zstandard.ZstdDecompressor(max_window_size=2**27).decompress(
        frame, max_output_size=size, allow_extra_data=False
    )
    if len(data) != size:
        raise zstandard.ZstdError(f"it holds {len(data)} bytes and says {size}")
    return data


def _end_of(info: Any, begin: int) -> int | None:
    """Where a stream ends that begins at `begin`; None when this is not its description."""
    match info:
        case {"dtype": "U8", "shape": [int(size)], "data_offsets": [int(first), int(last)]}:
            exact = len(info) == 3 and not any(isinstance(n, bool) for n in (size, first, last))
            return last if exact and first == begin and size == last - first > 0 else None
    return None
