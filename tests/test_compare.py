"""Comparisons: what is run, what is not run again, and what the table says of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from frugal_rl import compare
from frugal_rl.arms import Arm
from frugal_rl.cli import cli
from frugal_rl.compare import Run, Study, best_rate, make_study, results, run_all
from frugal_rl.compare_table import markdown, text
from frugal_rl.errors import FrugalError, InputError
from frugal_rl.report.comparison import as_drawing, as_page

SMALL = ["rollout.prompts=4", "rollout.samples=4", "data.heldout=8", "train.steps=2", "rollout.max_tokens=24"]
STEPS, PROBLEMS = 6, 40


def study_of(
    folder: Path, arms: str = "sgd,adamw,lora:1", grids: tuple[str, ...] = (), seeds: int = 3
) -> Study:
    changes = [f"train.steps={STEPS}"]
    return make_study("tiny", changes, arms.split(","), grids, seeds, folder, lambda name: 128)


def pretend(run: Run, accuracy: float, reward: float = 0.5, **more: Any) -> None:
    """A finished run folder, as train leaves it. The first problems are the ones answered."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "recipe.toml").write_text(run.resolved().to_toml())
    correct = "1" * round(accuracy * PROBLEMS)
    correct += "0" * (PROBLEMS - len(correct))
    score = {"value": accuracy, "low": 0.0, "high": 1.0, "problems": PROBLEMS}
    phases = {"generate": 1.0, "verify": 0.25, "learn": 2.0}
    peaks = {"generate": 5 << 20, "verify": 4 << 20, "learn": (6 << 20) + run.seed}
    row = {"reward": reward, "seconds": 4.0, "phase_seconds": phases, "generated_tokens": 100}
    rows = [row | {"phase_peak_bytes": peaks}] + [row | {"phase_peak_bytes": dict.fromkeys(peaks, 0)}] * 5
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:STEPS]))
    validations = [{"step": 0, "accuracy": {"value": 0.0}, "correct": "0" * PROBLEMS}]
    validations += [{"step": STEPS // 2, "accuracy": {"value": accuracy}, "correct": correct}]
    validations += [{"step": STEPS, "accuracy": score, "correct": correct}]
    (run.folder / "validation.jsonl").write_text("".join(json.dumps(x) + "\n" for x in validations))
    learning = {"boundary states": 1, "micro-batch": 2, "gradient scratch": 3}
    summary = {
        "accuracy_after": score,
        "parameters": 1000,
        "changed_any": 100,
        "changed_1e5": 50,
        "patch_bytes": 200,
        "train_seconds": 24.0,
        "weights_bytes": 2000,
        "optimizer_bytes": 0,
        "peak_memory_bytes": 10**6,
        "plan": {"generating": {"KV pool": 7}, "learning": learning},
        **more,
    }
    (run.folder / "summary.json").write_text(json.dumps(summary))


def finish_all(study: Study, accuracy: dict[str, float], best: int = 1) -> None:
    for arm in study.arms:
        for number, lr in enumerate(study.grids[arm.name]):
            for seed in study.seeds if number == best else study.seeds[:1]:
                more = {"adapter_bytes": 64, "merge_lost": 0.0125, "exported_correct": "1" * PROBLEMS}
                reward = 0.9 if number == best else 0.3
                pretend(
                    study.run(arm, lr, seed),
                    accuracy[arm.kind],
                    reward,
                    **(more if arm.kind == "lora" else {}),
                )


# --- arms and studies


@pytest.mark.parametrize(
    "written,name,overrides",
    [
        ("sgd", "sgd", ['learner.kind="sgd"', 'model.weights="bf16"']),
        ("sgd-int8", "sgd-int8", ['learner.kind="sgd"', 'model.weights="int8"']),
        ("lora", "lora:16", ['learner.kind="lora"', 'model.weights="bf16"', "learner.rank=16"]),
        ("lora-int8:2", "lora-int8:2", ['learner.kind="lora"', 'model.weights="int8"', "learner.rank=2"]),
        (
            "sgd-momentum:0.5",
            "sgd-momentum:0.5",
            ['learner.kind="sgd-momentum"', 'model.weights="bf16"', "learner.momentum=0.5"],
        ),
    ],
)
def test_an_arm_is_a_recipe_but_for_its_learner(written: str, name: str, overrides: list[str]) -> None:
    arm = Arm.parse(written)
    assert (arm.name, arm.overrides()) == (name, overrides)
    assert Arm.parse(arm.name) == arm


@pytest.mark.parametrize(
    "bad", ["adam", "lora:0", "lora:x", "sgd:1", "adamw-int8", "lora-host:1", "sgd-momentum:1", ""]
)
def test_what_is_no_arm_is_refused(bad: str) -> None:
    with pytest.raises(InputError, match="--arms"):
        Arm.parse(bad)


def test_default_grids_have_three_rates_and_lora_has_ten_times_adamws() -> None:
    assert Arm.parse("sgd").default_grid(0.1, 4096) == (0.03, 0.1, 0.3)
    assert Arm.parse("sgd-momentum").default_grid(0.1, 4096) == (0.003, 0.01, 0.03)
    assert Arm.parse("adamw").default_grid(0.1, 4096) == (1e-6, 3e-6, 1e-5)  # the papers' 1e-6 is among them
    assert Arm.parse("lora:1").default_grid(0.1, 4096) == (1e-5, 3e-5, 1e-4)


@pytest.mark.parametrize(
    "arms,grids,overrides,why",
    [
        ("sgd", (), (), "at least two"),
        ("sgd,sgd", (), (), "each once"),
        ("sgd,adamw", ("adamw=1e-4",), (), "same number of runs"),
        ("sgd,adamw", ("lora:1=1e-4",), (), "not among the arms"),
        ("sgd,adamw", ("adamw",), (), "expected ARM=LR"),
        ("sgd,adamw", ("adamw=a,b",), (), "expected ARM=LR"),
        ("sgd,adamw", ("adamw=0,1,2",), (), "above 0"),
        ("sgd,adamw", (), ("learner.lr=0.1",), "sets learner.lr itself"),
        ("sgd,adamw", (), ("no.key=1",), "no"),
        ("sgd-int8,adamw", (), ("rollout.samples=1",), "samples"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    arms: str, grids: tuple[str, ...], overrides: tuple[str, ...], why: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=why):
        make_study("tiny", overrides, arms.split(","), grids, 3, tmp_path / "out", lambda name: 128)
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder_for_runs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        study_of(tmp_path / "file")


# --- running


def test_every_arm_gets_the_same_runs_and_the_best_rate_by_training_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, ran = study_of(tmp_path), list[tuple[str, float, int]]()

    def execute(run: Run, lock: int) -> None:
        ran.append((run.arm.name, run.lr, run.seed))
        # held-out accuracy is best at the lowest rate, reward at the highest: the reward decides
        pretend(run, 1 - run.lr, reward=run.lr)

    monkeypatch.setattr(compare, "_execute", execute)
    run_all(study, lambda line: None, {})
    for arm in study.arms:
        grid = study.grids[arm.name]
        mine = [(lr, seed) for name, lr, seed in ran if name == arm.name]
        assert mine == [*((lr, 0) for lr in grid), (grid[-1], 1), (grid[-1], 2)]
        assert best_rate(study, arm) == grid[-1]
    said: list[str] = []
    ran.clear()
    run_all(study, said.append, {})
    assert not ran and all("finished before" in line for line in said)


def test_an_unfinished_run_goes_on_with_plain_sgd_and_begins_anew_elsewhere(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    for arm, expected in zip(study.arms, ("--resume", "--force", "--force"), strict=True):
        run = study.run(arm, study.grids[arm.name][0], 0)
        assert not run.finished and expected not in run.further()
        pretend(run, 0.5, accuracy_after=None)
        assert not run.finished
        assert expected in run.further()


def test_a_folder_of_another_recipe_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    run = study.run(study.arms[0], 0.01, 0)
    pretend(run, 0.5)
    (run.folder / "recipe.toml").write_text("[train]\nsteps = 1\n")
    with pytest.raises(InputError, match="another recipe"):
        run_all(study, lambda line: None, {})


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, failed = study_of(tmp_path), dict[str, str]()

    def execute(run: Run, lock: int) -> str | None:
        if run.arm.kind == "adamw":
            return "exit code 1: error: made here"
        if run.arm.kind == "lora" and run.seed == 2:
            return "exit code 1: error: the last seed"
        pretend(run, 0.5)
        return None

    monkeypatch.setattr(compare, "_execute", execute)
    run_all(study, lambda line: None, failed)
    assert len(failed) == 3 + 1
    found = results(study, failed)
    assert "made here" in found["arms"]["adamw"]["error"]
    assert found["arms"]["lora:1"]["seeds_finished"] == [0, 1]
    assert found["arms"]["lora:1"]["against"]["seeds"] == 2
    for shown in (text(found), markdown(found, ["frugal-rl", "compare"])):
        assert "adamw has no result: exit code 1: error: made here" in shown
        assert "lora:1: only seeds 0, 1 of 3 finished" in shown
        assert "the last seed" in shown


def test_a_folder_that_a_run_left_behind_still_writes_to_is_not_touched(tmp_path: Path) -> None:
    study = study_of(tmp_path / "out")
    with compare._locked(study.folder) as lock:
        left = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    try:  # the comparison is gone, its run is not
        with pytest.raises(InputError, match="at work here"):
            run_all(study, lambda line: None, {})
    finally:
        left.communicate(b"\n", timeout=60)
    with compare._locked(study.folder):
        pass


# --- the table


def test_the_table_says_what_differs_by_more_than_noise(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    finish_all(study, {"sgd": 0.5, "adamw": 0.5, "lora": 0.9})
    found = results(study, {})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    arms = found["arms"]
    assert found["reference"] == "sgd" and "against" not in arms["sgd"]
    assert arms["adamw"]["against"]["verdict"] == "within noise"
    assert arms["lora:1"]["against"]["verdict"] == "higher"
    assert arms["lora:1"]["against"]["value"] == pytest.approx(0.4)
    assert arms["lora:1"]["against"]["mcnemar_p"] == pytest.approx([2 * 0.5**16] * 3)
    assert arms["lora:1"]["applied_less_trained"]["value"] == pytest.approx(0.1)
    span = {"step": [3, 3], "seconds": [12.0, 12.0]}
    assert arms["lora:1"]["reached"] == {"step": 3, "seconds": 12.0, "seeds": 3, "span": span}
    assert arms["sgd"]["reached"]["step"] is None
    assert arms["sgd"]["tokens_per_s"] == 100.0
    assert [arms["sgd"][f"{phase}_seconds"] for phase in ("generate", "verify", "learn")] == [1.0, 0.25, 2.0]
    # the most of all steps, mean over the seeds
    assert arms["sgd"]["phase_peak_bytes"] == {"generate": 5 << 20, "verify": 4 << 20, "learn": (6 << 20) + 1}
    shown = text(found)
    for part in ("within noise", "+40.0 (", "10.00%", "5.00%", "0 of 3 seeds", "0, exact", "1.2%", "3.1e-05"):
        assert part in shown, part
    assert re.search(r"of the phase learn +6\.0 MiB +6\.0 MiB +6\.0 MiB", shown)
    lines = markdown(found, ["frugal-rl", "compare", "tiny"]).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert {
        line.count("|")
        for line in table[: table.index("| arm | learning rate | reward, second half | held-out accuracy |")]
    } == {5}
    commands = [line for line in lines if line.startswith("frugal-rl train")]
    assert len(commands) == 9
    assert all("learner.lr=" in line and "train.seed=" in line for line in commands)


def test_a_peak_that_was_not_measured_is_unknown_and_not_0(tmp_path: Path) -> None:
    study = study_of(tmp_path, seeds=1)
    finish_all(study, {"sgd": 0.5, "adamw": 0.5, "lora": 0.5})
    for run in (study.run(arm, study.grids[arm.name][1], 0) for arm in study.arms):
        metrics = run.folder / "metrics.jsonl"
        metrics.write_text(metrics.read_text().replace('"learn": 0', '"learn": null'))
    found = results(study, {})
    assert all(value["phase_peak_bytes"]["learn"] is None for value in found["arms"].values())
    assert re.search(r"of the phase learn +unknown +unknown +unknown", text(found))
    assert as_page(found, "frugal-rl compare tiny").count("unknown") >= 3


def test_what_differs_by_seed_is_shown_with_its_lowest_and_highest(tmp_path: Path) -> None:
    study = study_of(tmp_path, arms="sgd,adamw")
    finish_all(study, {"sgd": 0.5, "adamw": 0.5})
    arm, lr = study.arms[0], study.grids["sgd"][1]
    pretend(study.run(arm, lr, 1), 0.5, 0.6, changed_any=130, patch_bytes=260, train_seconds=30.0)
    found = results(study, {})["arms"]["sgd"]
    assert found["mean_reward"] == pytest.approx(0.8)
    assert found["span"]["mean_reward"] == pytest.approx([0.6, 0.9])
    shown = text(results(study, {}))
    for cell in ("0.800 (0.600 to 0.900)", "11.00% (10.00% to 13.00%)", "220 (200 to 260)", "26 (24 to 30)"):
        assert cell in shown, cell
    assert re.search(r"by more than 1e-5 +5\.00% +5\.00%\n", shown)  # equal seeds: no brackets
    assert "Other brackets: lowest and highest seed" in shown


def test_a_best_rate_at_the_edge_of_its_grid_is_said(tmp_path: Path) -> None:
    study = study_of(tmp_path, seeds=1)
    finish_all(study, {"sgd": 0.5, "adamw": 0.5, "lora": 0.5}, best=2)
    shown = text(results(study, {}))
    assert shown.count("(edge)") == 3 and shown.count("at the edge of its grid") == 3


def test_a_rate_that_worked_for_the_first_seed_alone_is_said(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    finish_all(study, {"sgd": 0.9, "adamw": 0.9, "lora": 0.9})
    assert "points apart" not in text(results(study, {}))
    pretend(study.run(study.arms[1], study.grids["adamw"][1], 2), 0.1)
    notes = [line for line in text(results(study, {})).splitlines() if "points apart" in line]
    assert len(notes) == 1 and notes[0].startswith("adamw: its seeds end 80 points apart")


def test_nothing_finished_is_a_table_of_errors(tmp_path: Path) -> None:
    found = results(study_of(tmp_path), {})
    assert found["reference"] is None
    assert "sgd has no result: not finished" in text(found)
    assert markdown(found, ["frugal-rl"])


def test_the_page_has_every_arm_and_nothing_from_outside(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    finish_all(study, {"sgd": 0.5, "adamw": 0.5, "lora": 0.9})
    found = results(study, {"<b>folder": "<i>why"})
    shown = as_page(found, "frugal-rl compare tiny")
    for arm in study.arms:
        assert f"{arm.name}: held-out accuracy" in shown
    for part in (
        "within noise",
        "+40.0 (",
        "held-out accuracy by seconds",
        "Peak memory by phase",
        "Changed entries",
        "adapter",
        "&lt;i&gt;why",
    ):
        assert part in shown, part
    for part in ("http", "<script", "<i>why", "<link"):
        assert part not in shown, part
    assert as_page(results(study_of(tmp_path / "empty"), {}), "frugal-rl compare").count("not finished")


def test_the_drawing_is_a_file_that_shows_every_arm(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    finish_all(study, {"sgd": 0.5, "adamw": 0.5, "lora": 0.9})
    drawn = ElementTree.fromstring(as_drawing(results(study, {})))
    words = [element.text for element in drawn.iter() if element.tag.endswith("}text")]
    for arm in study.arms:
        assert words.count(arm.name) >= 6  # in the legend of curves, beside the bars of the others
    assert float(drawn.attrib["height"]) > 500
    empty = as_drawing(results(study_of(tmp_path / "empty"), {}))
    assert empty.count("nothing to show yet") >= 6
    assert "script" not in empty and "href" not in empty


# --- as a person does


def command(folder: Path, arms: str, *changes: str) -> list[str]:
    parts = ["compare", "tiny", "--arms", arms, "--seeds", "1", "-o", str(folder)]
    for change in (*SMALL, *changes):
        parts += ["--set", change]
    return parts


def test_real_runs_end_in_a_table_and_are_not_run_again(tmp_path: Path) -> None:
    arguments = command(tmp_path / "out", "sgd-int8,lora:1", "train.steps=1")
    arguments += ["--lr-grid", "sgd-int8=0.01", "--lr-grid", "lora:1=1e-3"]
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "out" / "compare.json").read_text())
    lora = found["arms"]["lora:1"]
    assert lora["adapter_bytes"] > 0 and 0 < lora["merge_lost"] < 1
    assert found["arms"]["sgd-int8"]["export_lost"] >= 0
    assert [run["curve"][-1]["step"] for run in lora["runs"]] == [1]
    assert all(found["arms"][name]["phase_peak_bytes"]["learn"] > 0 for name in found["arms"])
    assert (tmp_path / "out" / "compare.html").exists() and (tmp_path / "out" / "compare.svg").exists()
    assert (tmp_path / "out" / "compare.md").read_text().startswith("# Comparison: sgd-int8, lora:1")
    again = CliRunner().invoke(cli, arguments)
    assert again.stderr.count("finished before") == 2
    assert "held-out accuracy" in again.stdout


def test_an_arm_that_fails_is_named_with_its_error(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1", "answer": "1"}\n')
    arguments = command(tmp_path / "out", "sgd,adamw", f"data.source={rows}", "data.heldout=1")
    arguments += ["--lr-grid", "sgd=0.01", "--lr-grid", "adamw=1e-3"]
    result = CliRunner().invoke(cli, arguments)
    assert isinstance(result.exception, FrugalError) and "2 runs failed" in str(result.exception)
    assert "sgd has no result: exit code 2: error:" in result.stdout
    assert (tmp_path / "out" / "compare.json").exists()


def test_ctrl_c_ends_after_a_step_and_the_same_command_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    arguments = command(folder, "sgd,adamw", "train.steps=40")
    arguments += ["--lr-grid", "sgd=0.01", "--lr-grid", "adamw=1e-4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "frugal_rl", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    run = next(iter([folder / "sgd" / "lr-0.01-seed-0"]))
    deadline = time.monotonic() + 120
    while not (run / "journal" / "00000001.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "the same command goes on" in error
    assert "sgd has no result: not finished" in out
    assert "stopping after this step" in run.with_name(run.name + ".log").read_text()
    study = make_study(
        "tiny",
        [*SMALL, "train.steps=40"],
        ["sgd", "adamw"],
        ["sgd=0.01", "adamw=1e-4"],
        1,
        folder,
        lambda name: 128,
    )
    mine = study.run(study.arms[0], 0.01, 0)
    assert not mine.finished and mine.further() == ["train", "--resume", str(run)]
