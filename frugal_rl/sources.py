"""Rows from where people keep them: JSON Lines, Parquet, datasets of the Hugging Face hub.

    rows.jsonl   rows.parquet   hub:openai/gsm8k/main:train   hub:./folder:test

Invariants
- A row comes with the name of its place, `path:line` or `hub:name:split:row`, counted from 1: what a
  person needs to find it again.
- A row is what JSON can say, whatever it was read from: times and decimals are texts, bytes (pictures)
  are left out. So it can be given to a reward in another process.
- Parquet is read in batches and hub datasets through their memory map: only the rows that are kept take
  memory. pyarrow and datasets (extra `hub`) are imported by who needs them.

A hub name is `owner/name`, then `/config` if it has several, then `:split` (absent: train), which may be
a part such as `train[:1000]`, as datasets.load_dataset has them. A local folder is named by its path.
"""

from __future__ import annotations

import datetime
import decimal
import difflib
import importlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from frugal_rl.errors import InputError

Row = dict[str, Any]

HUB: Final = "hub:"
JSON_LINES: Final = (".jsonl", ".json", ".ndjson")
PARQUET: Final = ".parquet"
BATCH_ROWS: Final = 1_024


@dataclass(frozen=True)
class Read:
    """A row as it was read. `id` is the same on every machine."""

    where: str  # for messages
    id: str
    fields: Row


def is_source(source: str) -> bool:
    """Whether a source names rows to read, by its form alone; else it can only be a built-in task."""
    return source.startswith(HUB) or source.endswith((".jsonl", PARQUET))


def read_rows(source: str) -> Iterator[Read]:
    """Raises: InputError, which names the place."""
    if source.startswith(HUB):
        yield from _read_hub(source)
        return
    path = Path(source)
    rows = _read_parquet(path) if path.suffix == PARQUET else read_jsonl(path)
    for number, fields in rows:
        yield Read(f"{path}:{number}", f"{path.name}:{number}", fields)


def read_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    """The objects of a JSON Lines file with the line number of each; empty lines are passed over."""
    if path.suffix not in JSON_LINES:
        raise InputError(
            f"{path}: expected a JSON Lines file (.jsonl), one object a line, or a Parquet file (.parquet)"
        )
    _must_exist(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: not UTF-8 at byte {error.start} of the line") from error
        except (json.JSONDecodeError, RecursionError) as error:
            what = (
                f"{error.msg} at column {error.colno}" if isinstance(error, ValueError) else "nested too deep"
            )
            raise InputError(f"{where}: not JSON: {what}") from error
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object with fields, got {type(row).__name__}")
        yield number, row


def _read_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    _must_exist(path)
    parquet = _optional("pyarrow.parquet", f"{path}: Parquet needs pyarrow")
    pyarrow = importlib.import_module("pyarrow")
    try:
        file = parquet.ParquetFile(path, memory_map=True)
        number = 0
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield number, _plain_row(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a Parquet file that can be read: {_line(error)}") from error


def hub_name(source: str) -> tuple[str, str | None, str]:
    """`hub:owner/name/config:split` as the arguments of load_dataset: path, config, split."""
    name, colon, split = source.removeprefix(HUB).partition(":")
    split = split if colon else "train"
    if not name or not split:
        raise InputError(
            f"{source!r}: expected hub:owner/name, hub:owner/name/config or hub:owner/name:split"
        )
    if name.startswith((".", "/", "~")):
        return os.path.expanduser(name), None, split
    parts = name.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise InputError(
            f"{source!r}: expected hub:owner/name/config:split, with the config only if there are several; "
            "a folder here is hub:./folder"
        )
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split


def _read_hub(source: str) -> Iterator[Read]:
    path, config, split = hub_name(source)
    datasets = _optional("datasets", f"{source}: hub datasets need the package datasets")
    if path.startswith((".", "/")) and not Path(path).is_dir():  # a hub name never starts so
        raise InputError(f"{source}: {path} is no folder{_nearest(Path(path))}")
    try:
        local = os.path.abspath(path) if path.startswith((".", "/")) else path  # "." has no name
        table = datasets.load_dataset(local, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # no network, no such dataset or config or split, files that do not parse: all end here
        raise InputError(f"{source}: the dataset cannot be loaded: {_line(error)}") from error
    place = f"{source if source.endswith(f':{split}') else f'{source}:{split}'}"
    for number, row in enumerate(table, 1):
        yield Read(f"{place}:{number}", f"{place}:{number}", _plain_row(row))


def _optional(module: str, why: str) -> Any:
    """A module of the extra `hub`. Raises: InputError, which says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{why}: pip install 'frugal-rl[hub]' ({error})") from error


def _plain_row(row: Row) -> Row:
    return {key: plain for key, value in row.items() if (plain := _plain(value)) is not _LEFT_OUT}


_LEFT_OUT: Final = object()


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, dict):
        return _plain_row(value)
    if isinstance(value, list | tuple):
        return [plain for item in value if (plain := _plain(item)) is not _LEFT_OUT]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(value)
    return _LEFT_OUT


def _line(error: BaseException) -> str:
    """An error of another package in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _must_exist(path: Path) -> None:
    if not path.exists():
        raise InputError(f"{path}: no such file{_nearest(path)}")


def _nearest(path: Path) -> str:
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
