"""The run folder: written step by step, read back, cut off anywhere."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from frugal_rl.config import load_recipe
from frugal_rl.errors import InputError
from frugal_rl.journal import Journal, shortened
from frugal_rl.patch import BaseInfo, Patch, PatchError, TensorPatch

RECIPE = load_recipe("tiny")


def step_patch(number: int) -> Patch:
    positions = np.array([number, number + 3])
    before, after = np.array([1, 2], "u2"), np.array([2, 1], "u2")
    tensor = TensorPatch.from_bits("BF16", (40,), positions, before, after)
    return Patch({"w": tensor}, BaseInfo("base", {}), {})


def make_run(folder: Path, steps: int) -> Journal:
    journal = Journal.create(folder, RECIPE, force=False)
    for number in range(1, steps + 1):
        journal.commit(step_patch(number), drawn=32 * number, metrics={"step": number, "reward": 0.5})
    return journal


def test_what_was_committed_is_replayed_in_order_with_its_counters(tmp_path: Path) -> None:
    written = make_run(tmp_path / "run", 5)
    journal, recipe = Journal.open(tmp_path / "run")
    patches = list(journal.replay())
    assert recipe == RECIPE
    assert [p.tensors["w"] for p in patches] == [step_patch(n).tensors["w"] for n in range(1, 6)]
    assert (journal.step, journal.drawn, journal.tip) == (5, 160, written.tip)
    assert journal.metrics == written.metrics


def test_a_step_names_the_hash_of_the_file_before_it(tmp_path: Path) -> None:
    """blake2b of 16 bytes, whatever version of this package wrote the journal or goes on with it."""
    journal, before = make_run(tmp_path / "run", 3), ""
    for number in (1, 2, 3):
        data = journal.path(number).read_bytes()
        assert Patch.decode(data).meta["previous"] == before
        before = hashlib.blake2b(data, digest_size=16).hexdigest()
    assert journal.tip == before


def test_a_new_run_has_the_files_it_is_given_and_empty_ones_for_its_lines(tmp_path: Path) -> None:
    Journal.create(tmp_path / "run", RECIPE, force=False, files={"problems.json": b"{}\n", "x": b""})
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()} == {
        "recipe.toml": RECIPE.to_toml().encode(),
        "metrics.jsonl": b"",
        "samples.jsonl": b"",
        "problems.json": b"{}\n",
        "x": b"",
    }
    assert not any((tmp_path / "run" / "journal").iterdir())
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_step_in_the_past_can_be_reached(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 5)
    journal, _ = Journal.open(tmp_path / "run")
    assert len(list(journal.replay(last=2))) == 2
    assert (journal.step, journal.drawn) == (2, 64)


@pytest.mark.parametrize("left", [0, 1, 100, -1])
def test_a_torn_last_step_is_set_aside_with_a_note(tmp_path: Path, left: int) -> None:
    make_run(tmp_path / "run", 3)
    journal, _ = Journal.open(tmp_path / "run")
    path = journal.path(3)
    path.write_bytes(path.read_bytes()[:left])
    assert len(list(journal.replay())) == 2
    assert journal.step == 2
    assert not path.exists()
    assert path.with_suffix(".damaged").exists()
    assert "set aside" in journal.notes[0]
    journal.commit(step_patch(3), 96, {"step": 3})
    again, _ = Journal.open(tmp_path / "run")
    assert len(list(again.replay())) == 3


def test_damage_before_the_last_step_is_an_error(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 3)
    journal, _ = Journal.open(tmp_path / "run")
    journal.path(2).write_bytes(b"nothing")
    with pytest.raises(PatchError):
        list(journal.replay())


def test_a_step_of_another_run_does_not_follow(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 3)
    other = Journal.create(tmp_path / "b", RECIPE, force=False)
    other.commit(step_patch(9), 1, {"step": 1})
    journal, _ = Journal.open(tmp_path / "a")
    journal.path(1).write_bytes(other.path(1).read_bytes())
    with pytest.raises(PatchError, match="does not follow"):
        list(journal.replay())


@pytest.mark.parametrize("left", ["", '{"step": 1}\n{"st', "all"])
def test_metrics_are_written_anew_from_the_steps_that_were_committed(tmp_path: Path, left: str) -> None:
    make_run(tmp_path / "run", 3)
    file = tmp_path / "run" / "metrics.jsonl"
    whole = file.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    file.write_text(whole + '{"step": 4, "re' if left == "all" else left)
    journal, _ = Journal.open(tmp_path / "run")
    list(journal.replay())
    journal.restore()
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows


def test_the_best_evaluation_is_the_earliest_of_the_highest(tmp_path: Path) -> None:
    journal = make_run(tmp_path / "run", 6)
    for step, value in enumerate([0.2, 0.5, 0.9, 0.9, 0.3, 0.9]):
        journal.validate(step, {"value": value})
    assert journal.best() == {"step": 2, "accuracy": {"value": 0.9}}
    assert journal.since_best() == 3
    journal.validate(2, {"value": 1.0})  # a step has one accuracy
    assert journal.best()["accuracy"] == {"value": 0.9}


def test_evaluations_of_steps_that_were_lost_are_forgotten(tmp_path: Path) -> None:
    journal = make_run(tmp_path / "run", 4)
    for step in (0, 2, 4):
        journal.validate(step, {"value": step / 10})
    journal.path(4).unlink()
    with open(tmp_path / "run" / "validation.jsonl", "a") as file:
        file.write('{"step": 1, "accu')
    again, _ = Journal.open(tmp_path / "run")
    list(again.replay())
    again.restore()
    assert [row["step"] for row in again.validations] == [0, 2]


def test_an_existing_folder_is_never_overwritten_without_force(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 2)
    with pytest.raises(InputError, match="--force"):
        Journal.create(tmp_path / "run", RECIPE, force=False)
    assert Journal.open(tmp_path / "run")[0].path(2).exists()
    Journal.create(tmp_path / "run", RECIPE, force=True)
    assert list(Journal.open(tmp_path / "run")[0].replay()) == []


def test_force_does_not_remove_what_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match="not a run"):
        Journal.create(tmp_path / "precious", RECIPE, force=True)
    assert (tmp_path / "precious" / "thesis.tex").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"recipe\.toml"):
        Journal.open(tmp_path)


def test_samples_are_committed_with_their_step_and_written_anew_from_the_journal(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "run", RECIPE, force=False)
    rows = [{"step": n, "response": "a\n\u2028\ud7ff" * n} for n in (1, 2, 3)]
    for row in rows:
        journal.commit(step_patch(row["step"]), 0, {"step": row["step"]}, [row, row])
    file = tmp_path / "run" / "samples.jsonl"
    whole = file.read_text()
    assert [json.loads(line) for line in whole.splitlines()] == [row for row in rows for _ in (1, 2)]
    journal.path(3).unlink()
    for left in ("", whole[:-9], whole):
        file.write_text(left)
        again, _ = Journal.open(tmp_path / "run")
        list(again.replay())
        again.restore()
        assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 1, 2, 2]


def test_a_run_of_a_version_without_samples_goes_on(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "run", RECIPE, force=False)
    first = step_patch(1)
    meta = {"step": 1, "drawn": 32, "previous": "", "metrics": {"step": 1}}
    journal.path(1).write_bytes(Patch(first.tensors, first.base, meta).encode())
    again, _ = Journal.open(tmp_path / "run")
    assert len(list(again.replay())) == 1
    again.restore()
    assert again.samples == []


def test_a_long_text_keeps_its_beginning_and_end() -> None:
    text = "".join(str(n % 10) for n in range(5000))
    short = shortened(text)
    assert short == f"{text[:1000]} [... 3,000 characters left out ...] {text[-1000:]}"
    assert shortened(text[:2000]) == text[:2000]


def test_one_who_only_reads_leaves_a_torn_step_where_it_is(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 3)
    journal, _ = Journal.open(tmp_path / "run")
    journal.path(3).write_bytes(b"torn")
    assert len(list(journal.replay(keep=True))) == 2
    assert journal.path(3).read_bytes() == b"torn"
    assert "left out" in journal.notes[0]
