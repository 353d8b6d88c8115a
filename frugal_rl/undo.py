"""The undo file that makes a change of a folder's weights in place safe.

Law: whenever the process or the machine stops, the folder is the old one, the new one, or has a
whole undo file that leads back to the old one. Order, each step durable before the next begins:
    undo file (old bits of every entry to change) -> the entries -> undo file removed
Invariants: the undo file appears whole, by a rename; taking back can be repeated; one process at a
time holds a folder's lock, which the system releases when the process ends.

The file: a line of JSON {"format", "records": [{"file", "offset", "width", "entries"}]}, then for
each record its positions as int64 and its old bits, then the 16-byte blake2b of all before it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from frugal_rl.container import HASH_BYTES
from frugal_rl.errors import InputError
from frugal_rl.patch import sync_folder, write_atomically

UNDO_FILE = ".frugal_rl-undo"
FORMAT = "frugal_rl undo 1"


@dataclass(frozen=True)
class Record:
    """Old bits [N] of a tensor that begins at byte `offset` of a file beside the undo file."""

    file: str
    offset: int
    positions: npt.NDArray[np.int64]
    old: npt.NDArray[Any]


def refuse_if_interrupted(folder: Path) -> None:
    """Raises InputError where a change in place was begun and not ended."""
    if (folder / UNDO_FILE).exists():
        raise InputError(
            f"{folder}: a change in place was interrupted, or another process is at it; begin the change "
            "again (patch apply --in-place or patch revert --in-place), which first takes back what was done"
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against other changes in place. Raises InputError where there is one."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InputError(f"{folder}: is no folder that can be opened ({error.strerror})") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process changes it in place; wait for it to end") from None
        yield
    finally:
        os.close(descriptor)


def write(folder: Path, records: Sequence[Record]) -> None:
    """Make the old bits durable, before the first entry changes."""
    table = [
        {"file": r.file, "offset": r.offset, "width": r.old.itemsize, "entries": len(r.old)} for r in records
    ]
    parts = [json.dumps({"format": FORMAT, "records": table}).encode() + b"\n"]
    for record in records:
        parts += [record.positions.astype("<i8").tobytes(), record.old.tobytes()]
    data = b"".join(parts)
    write_atomically(folder / UNDO_FILE, data + blake2b(data, digest_size=HASH_BYTES).digest())


def finish(folder: Path, records: Sequence[Record]) -> None:
    """Make the entries durable, then remove the undo file."""
    for name in sorted({record.file for record in records}):
        sync_file(folder / name)
    (folder / UNDO_FILE).unlink()
    sync_folder(folder)


def recover_(folder: Path) -> bool:
    """Write the old bits back where an undo file is found; False where there is none. Needs the lock."""
    for unfinished in folder.glob(f".{UNDO_FILE}.*.partial"):  # nothing was changed yet
        unfinished.unlink()
    where = folder / UNDO_FILE
    if not where.exists():
        return False
    records = _read(where)
    for record in records:
        mapped = np.memmap(folder / record.file, np.uint8, "r+")
        for byte in range(record.old.itemsize):
            at = record.offset + record.positions * record.old.itemsize + byte
            mapped[at] = record.old.view(np.uint8)[byte :: record.old.itemsize]
        mapped.flush()
    finish(folder, records)
    return True


def _read(where: Path) -> list[Record]:
    data = where.read_bytes()
    body, digest = data[:-HASH_BYTES], data[-HASH_BYTES:]
    if blake2b(body, digest_size=HASH_BYTES).digest() != digest:
        raise InputError(f"{where}: is damaged, so the change cannot be taken back; restore the folder")
    line, _, arrays = body.partition(b"\n")
    header = json.loads(line)
    if header["format"] != FORMAT:
        raise InputError(
            f"{where}: is {header['format']!r}, expected {FORMAT!r}; use the version that wrote it"
        )
    records, at = [], 0
    for row in header["records"]:
        positions = np.frombuffer(arrays, "<i8", row["entries"], at)
        at += positions.nbytes
        old = np.frombuffer(arrays, f"<u{row['width']}", row["entries"], at)
        at += old.nbytes
        records.append(Record(Path(row["file"]).name, row["offset"], positions, old))
    return records


def sync_file(path: Path) -> None:
    """Make a file's content durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
