"""Changes in place: whatever stops them, the folder is the old one, the new one, or goes back."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from frugal_rl import checkpoint as folders
from frugal_rl import undo
from frugal_rl.checkpoint import Checkpoint
from frugal_rl.errors import InputError

from .test_checkpoint import Case, bytes_of, step, write_folder


@pytest.fixture(params=[0, 2], ids=["one file", "two shards"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return Case(tmp_path, request.param)


class Stopped(Exception):
    """Stands for the process being killed."""


@pytest.mark.parametrize("direction", ["apply", "revert"])
@pytest.mark.parametrize("writes_done", [0, 1, 3, 5])
def test_a_change_in_place_that_stops_anywhere_is_taken_back(
    case: Case, monkeypatch: pytest.MonkeyPatch, direction: str, writes_done: int
) -> None:
    folder = case.base if direction == "apply" else case.trained
    change = folders.apply_in_place if direction == "apply" else folders.revert_in_place
    old, original, count = bytes_of(folder), folders.map_tensor, 0

    def stopping(info: folders.TensorInfo, mode: str) -> np.ndarray:
        nonlocal count
        if mode == "r+":
            if count == writes_done:
                raise Stopped
            count += 1
        return original(info, mode)

    def never(path: Path) -> None:
        raise Stopped

    monkeypatch.setattr(folders, "map_tensor", stopping)
    monkeypatch.setattr(undo, "sync_file", never)
    with pytest.raises(Stopped):
        change(folder, case.patch)
    monkeypatch.undo()
    assert (folder / undo.UNDO_FILE).exists()
    for use in (
        Checkpoint,
        lambda f: folders.verify(f, case.patch),
        lambda f: folders.apply(f, case.patch, case.root / "x"),
    ):
        with pytest.raises(InputError, match="a change in place was interrupted"):
            use(folder)
    assert folders.recover(folder)
    assert bytes_of(folder) == old
    assert not folders.recover(folder)
    change(folder, case.patch)
    assert bytes_of(folder) == bytes_of(case.trained if direction == "apply" else folder)


def test_the_next_change_in_place_takes_an_interrupted_one_back_by_itself(case: Case) -> None:
    checkpoint = Checkpoint(case.base)
    writes = folders._writes(checkpoint, case.patch, "apply")
    undo.write(case.base, [undo.Record(w.info.file.name, w.info.offset, w.positions, w.old) for w in writes])
    half = writes[len(writes) // 2]
    folders.map_tensor(half.info, "r+")[half.positions] = half.new
    folders.apply_in_place(case.base, case.patch)
    assert bytes_of(case.base) == bytes_of(case.trained)


def test_each_part_of_a_change_in_place_is_durable_before_the_next_begins(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The undo file and its name; the entries; that the undo file is gone."""
    folder, real, seen = case.base, os.fsync, []
    old, new = weights_of(folder), weights_of(case.trained)

    def noted(descriptor: int) -> None:
        inode, weights = os.fstat(descriptor).st_ino, weights_of(folder)
        (path,) = (p for p in [folder, *folder.iterdir()] if p.stat().st_ino == inode)
        state = "old" if weights == old else "new" if weights == new else "between"
        seen.append((path.name.split(".123")[0], state, (folder / undo.UNDO_FILE).exists()))
        real(descriptor)

    monkeypatch.setattr(os, "getpid", lambda: 123)
    monkeypatch.setattr(os, "fsync", noted)
    folders.apply_in_place(folder, case.patch)
    files = [(name, "new", True) for name in sorted(new)]
    assert seen == [
        (f".{undo.UNDO_FILE}", "old", False),
        ("base", "old", True),
        *files,
        ("base", "new", False),
    ]


def weights_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_an_undo_file_that_was_never_finished_is_removed_and_nothing_is_taken_back(case: Case) -> None:
    old = bytes_of(case.base)
    unfinished = case.base / f".{undo.UNDO_FILE}.123.partial"
    unfinished.write_bytes(b"x" * 100)
    assert not folders.recover(case.base)
    assert not unfinished.exists() and bytes_of(case.base) == old


def test_a_damaged_undo_file_is_refused_and_kept(case: Case) -> None:
    (case.base / undo.UNDO_FILE).write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="is damaged, so the change cannot be taken back"):
        folders.apply_in_place(case.base, case.patch)
    assert (case.base / undo.UNDO_FILE).exists()


def test_two_changes_at_a_time_are_refused(case: Case) -> None:
    with undo.locked(case.base), pytest.raises(InputError, match="another process changes it"):
        folders.apply_in_place(case.base, case.patch)


def big_case(root: Path) -> tuple[Path, Path, Path]:
    rng = np.random.default_rng(0)
    before = {f"t{i}": ("BF16", (512, 512), rng.integers(0, 2**16, 512 * 512).astype("u2")) for i in range(6)}
    base = write_folder(root / "base", before, 2)
    trained = write_folder(root / "trained", step(before, 1, 0.2), 2)
    file = root / "p.safetensors"
    folders.diff(base, trained).save(file)
    return base, trained, file


LOOP = """
import sys
from frugal_rl import checkpoint
print("ready", flush=True)
while True:
    checkpoint.apply_in_place(sys.argv[1], sys.argv[2])
    checkpoint.revert_in_place(sys.argv[1], sys.argv[2])
"""


def test_a_process_killed_at_any_moment_leaves_a_folder_that_recovers(tmp_path: Path) -> None:
    base, trained, file = big_case(tmp_path)
    old, new = bytes_of(base), bytes_of(trained)
    interrupted, rng = 0, random.Random(0)
    for attempt in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", LOOP, str(base), str(file)], stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        ) as process:  # fmt: skip
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            deadline = time.monotonic() + 20
            while attempt % 2 and not (base / undo.UNDO_FILE).exists() and time.monotonic() < deadline:
                pass
            time.sleep(rng.uniform(0, 0.01 if attempt % 2 else 0.3))
            process.send_signal(signal.SIGKILL)
        interrupted += folders.recover(base)
        left = bytes_of(base)
        assert left in (old, new)
        if left == new:
            folders.revert_in_place(base, file)
    assert interrupted, "no kill fell into a change; the test has shown nothing"
