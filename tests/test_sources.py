"""sources.py: rows with the name of their place, from files of each kind and from hub datasets."""

from __future__ import annotations

import datetime
import decimal
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from frugal_rl.errors import InputError
from frugal_rl.sources import hub_name, is_source, read_rows

ROWS = [{"prompt": f"{i}+1?", "answer": str(i + 1), "extra": {"level": [i]}} for i in range(3)]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'frugal-rl[hub]'")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return str(path)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_what_names_rows_is_told_by_its_form() -> None:
    assert all(map(is_source, ("a.jsonl", "b/c.parquet", "hub:openai/gsm8k", "hub:./folder:test")))
    assert not any(map(is_source, ("last-digit", "gcd:3", "gym:chain_sum", "openai/gsm8k")))


def test_parquet_rows_are_those_of_json_lines_with_their_numbers(tmp_path: Path) -> None:
    table = list(read_rows(write_parquet(tmp_path / "x.parquet", ROWS)))
    lines = list(read_rows(write_jsonl(tmp_path / "x.jsonl", ROWS)))
    assert [row.fields for row in table] == [row.fields for row in lines] == ROWS
    assert [row.id for row in table] == ["x.parquet:1", "x.parquet:2", "x.parquet:3"]
    assert table[2].where == f"{tmp_path / 'x.parquet'}:3"


def test_a_row_is_what_json_can_say(tmp_path: Path) -> None:
    row = {
        "when": datetime.datetime(2026, 1, 2, 3, 4),
        "price": decimal.Decimal("1.50"),
        "picture": b"\x89PNG",
        "nested": {"bytes": b"x", "list": [1.5, None, True]},
        "nan": float("nan"),
    }
    (read,) = read_rows(write_parquet(tmp_path / "x.parquet", [row]))
    assert read.fields == {
        "when": "2026-01-02 03:04:00",
        "price": "1.50",
        "nested": {"list": [1.5, None, True]},
        "nan": "nan",
    }
    assert json.loads(json.dumps(read.fields)) == read.fields


def test_a_parquet_file_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'frugal-rl[hub]'")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match=r"bad\.parquet: not a Parquet file that can be read: \S"):
        list(read_rows(str(tmp_path / "bad.parquet")))
    with pytest.raises(InputError, match=r"bed\.parquet: no such file; did you mean .*bad\.parquet"):
        list(read_rows(str(tmp_path / "bed.parquet")))


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("hub:openai/gsm8k", ("openai/gsm8k", None, "train")),
        ("hub:openai/gsm8k/main:test", ("openai/gsm8k", "main", "test")),
        ("hub:openai/gsm8k/main:train[:100]", ("openai/gsm8k", "main", "train[:100]")),
        ("hub:../some/folder:test", ("../some/folder", None, "test")),
        ("hub:/some/folder", ("/some/folder", None, "train")),
    ],
)
def test_a_hub_name_has_an_owner_a_config_and_a_split(source: str, parts: tuple[Any, ...]) -> None:
    assert hub_name(source) == parts


@pytest.mark.parametrize("source", ["hub:", "hub:gsm8k", "hub:a/b:", "hub:a/b/c/d", "hub:a//b", "hub::train"])
def test_a_hub_name_of_another_form_is_refused(source: str) -> None:
    with pytest.raises(InputError, match=r"expected hub:owner/name"):
        hub_name(source)


def test_a_folder_of_files_is_read_as_the_hub_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'frugal-rl[hub]'")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    write_jsonl(tmp_path / "data" / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "data" / "test.jsonl", ROWS[:1])
    source = f"hub:{tmp_path / 'data'}"
    rows = list(read_rows(f"{source}:train[1:]"))
    assert [row.fields for row in rows] == ROWS[1:]
    assert rows[0].where == f"{source}:train[1:]:1"
    (row,) = read_rows(f"{source}:test")
    assert row.where == f"{source}:test:1"
    with pytest.raises(InputError, match=r"cannot be loaded: .*\bvalid\b"):
        list(read_rows(f"{source}:valid"))
    with pytest.raises(InputError, match=r"daat is no folder; did you mean .*data"):
        list(read_rows(f"hub:{tmp_path / 'daat'}"))


def test_a_hub_dataset_without_a_network_is_one_line() -> None:
    pytest.importorskip("datasets", reason="needs datasets: pip install 'frugal-rl[hub]'")
    with pytest.raises(InputError, match=r"^hub:nobody/nothing: the dataset cannot be loaded: [^\n]+$"):
        list(read_rows("hub:nobody/nothing"))


@pytest.mark.parametrize(("module", "source"), [("pyarrow", "x.parquet"), ("datasets", "hub:a/b")])
def test_a_package_that_is_not_there_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.parquet").write_bytes(b"PAR1")
    for name in (module, f"{module}.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"pip install 'frugal-rl\[hub\]'"):
        list(read_rows(source))
