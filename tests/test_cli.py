"""The command line as a person uses it: real processes, their output and exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from frugal_rl.patch import Patch

SMALL = [
    "--set",
    "rollout.prompts=4",
    "--set",
    "rollout.samples=4",
    "--set",
    "data.heldout=16",
    "--set",
    "train.steps=3",
]
FOLDER = Path(__file__).resolve().parent


def run(*words: str | Path, cwd: Path, ok: bool = True, **extra: Any) -> subprocess.CompletedProcess[str]:
    """`frugal-rl WORDS` in `cwd`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "frugal_rl", *map(str, words)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **extra,
    )
    if ok:
        assert done.returncode == 0, done.stderr
    return done


def refused(*words: str | Path, cwd: Path) -> str:
    """The one-line error of a command that is refused with exit code 2."""
    done = run(*words, cwd=cwd, ok=False)
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of three steps in `run`."""
    folder = tmp_path_factory.mktemp("cli")
    run("train", "-o", "run", *SMALL, cwd=folder)
    return folder


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_train_prints_a_line_a_step_and_the_commands_that_follow(weights: str, tmp_path: Path) -> None:
    done = run("train", "-o", "run", *SMALL, "--set", f"model.weights={weights}", cwd=tmp_path)
    assert ("lost to rounding" in done.stdout) == (weights == "int8")
    for word in ("reward", "no signal", "length", "truncated", "norm", "changed", "tok/s", "peak", "left"):
        assert word in done.stderr, word
    assert done.stderr.count("step ") == 3
    assert ", planned " in done.stdout
    last = done.stdout.splitlines()[-3:]
    assert last[0].endswith("frugal-rl patch apply tiny run/patch.safetensors -o trained")
    assert last[1].endswith("frugal-rl eval --patch run/patch.safetensors")
    assert last[2].endswith("frugal-rl train --resume run --set train.steps=6")
    for line in last:
        words = line.split("frugal-rl ", 1)[1].split()
        run(*words, cwd=tmp_path)


def test_the_run_folder_holds_what_scripts_rely_on(trained: Path) -> None:
    folder = trained / "run"
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("accuracy_before", "accuracy_after"):
        assert set(summary[key]) == {"value", "low", "high", "problems"}
    for key in ("parameters", "changed_any", "changed_1e5", "patch_bytes", "train_seconds"):
        assert summary[key] > 0, key
    assert summary["peak_memory_bytes"] > 50 << 20
    # beside it, the larger phase over what the process held before the weights were read
    assert summary["planned_memory_bytes"] > summary["plan"]["peak_bytes"] + (50 << 20)
    assert summary["seed"] == 0
    assert summary["patch_bytes"] == (folder / "patch.safetensors").stat().st_size
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["changed_any"] == summary["changed_any"]
    assert (folder / "recipe.toml").exists()


def test_apply_gives_the_trained_weights_and_revert_the_base_byte_for_byte(
    trained: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    patch = trained / "run" / "patch.safetensors"
    run("patch", "apply", "tiny", patch, "-o", "out", cwd=tmp_path)
    shown = json.loads(run("patch", "verify", "out", patch, "--full", "--json", cwd=tmp_path).stdout)
    assert shown["state"] == "applied"
    ours = run("eval", "--patch", patch, "--json", cwd=tmp_path)
    applied = run("eval", "--model", "out", *SMALL[4:6], "--json", cwd=tmp_path)
    assert json.loads(ours.stdout)["accuracy"] == json.loads(applied.stdout)["accuracy"]
    run("patch", "revert", "out", patch, "-o", "back", cwd=tmp_path)
    for file in sorted(p for p in tiny_folder.rglob("*") if p.is_file()):
        assert (tmp_path / "back" / file.relative_to(tiny_folder)).read_bytes() == file.read_bytes()
    run("patch", "apply", "back", patch, "--in-place", cwd=tmp_path)
    run("patch", "diff", "tiny", "back", "-o", "again.safetensors", cwd=tmp_path)
    remade = json.loads(run("patch", "show", "again.safetensors", "--json", cwd=tmp_path).stdout)
    original = json.loads(run("patch", "show", patch, "--json", cwd=tmp_path).stdout)
    assert remade["tensors"] == original["tensors"]


def test_a_seed_makes_a_run_repeat_bit_for_bit(trained: Path, tmp_path: Path) -> None:
    run("train", "-o", "same", *SMALL, cwd=tmp_path)
    run("train", "-o", "other", "--seed", "1", *SMALL, cwd=tmp_path)
    first = (trained / "run" / "patch.safetensors").read_bytes()
    assert (tmp_path / "same" / "patch.safetensors").read_bytes() == first
    assert (tmp_path / "other" / "patch.safetensors").read_bytes() != first


def test_a_run_that_is_resumed_ends_as_one_that_was_never_stopped(trained: Path, tmp_path: Path) -> None:
    run("train", "-o", "run", *SMALL, "--set", "train.steps=1", cwd=tmp_path)
    run("train", "--resume", "run", "--set", "train.steps=3", cwd=tmp_path)
    expected = (trained / "run" / "patch.safetensors").read_bytes()
    assert (tmp_path / "run" / "patch.safetensors").read_bytes() == expected


def test_a_killed_run_is_resumed_to_the_same_patch(trained: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "frugal_rl", "train", "-o", "run", *SMALL]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
    process = subprocess.Popen(words, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 1/"):
            break
    process.kill()
    process.wait()
    process.stderr.close()
    run("train", "--resume", "run", cwd=tmp_path)
    expected = (trained / "run" / "patch.safetensors").read_bytes()
    assert (tmp_path / "run" / "patch.safetensors").read_bytes() == expected


def test_the_policy_of_any_step_can_be_had(trained: Path, tmp_path: Path) -> None:
    run("patch", "at", trained / "run", "--step", "3", "-o", "three.safetensors", cwd=tmp_path)
    made, final = (Patch.load(p) for p in (tmp_path / "three.safetensors", trained / "run/patch.safetensors"))
    assert made.tensors == final.tensors
    assert made.base == final.base
    run("train", "-o", "run", *SMALL, "--set", "train.steps=2", cwd=tmp_path)
    run("patch", "at", trained / "run", "--step", "2", "-o", "two.safetensors", cwd=tmp_path)
    two = Patch.load(tmp_path / "two.safetensors")
    assert two.tensors == Patch.load(tmp_path / "run/patch.safetensors").tensors
    assert "has 3 steps" in refused("patch", "at", trained / "run", "--step", "4", "-o", "x", cwd=tmp_path)


def test_the_policy_of_a_step_of_an_int8_run_is_its_exported_patch(tmp_path: Path) -> None:
    done = run("train", "-o", "run", *SMALL, "--set", "model.weights=int8", cwd=tmp_path)
    assert "lost to rounding" in done.stdout
    run("patch", "at", "run", "--step", "3", "-o", "three.safetensors", cwd=tmp_path)
    made, final = (Patch.load(tmp_path / p) for p in ("three.safetensors", "run/patch.safetensors"))
    assert made.tensors == final.tensors
    assert made.base == final.base


def test_ctrl_c_ends_after_the_step_with_everything_saved(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "frugal_rl", "train", "-o", "run", *SMALL, "--set", "train.steps=400"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
    process = subprocess.Popen(
        words, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "stopping after this step" in err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 2 <= summary["steps"] <= 5
    assert summary["accuracy_after"] is None
    assert "not measured" in out
    assert "frugal-rl train --resume run" in out
    assert run("patch", "verify", "tiny", "run/patch.safetensors", cwd=tmp_path).returncode == 0


def test_json_prints_one_object_and_nothing_else(trained: Path, tmp_path: Path) -> None:
    patch = trained / "run" / "patch.safetensors"
    commands: list[list[str | Path]] = [
        ["train", "-o", "run", "--json", *SMALL],
        ["eval", "--problems", "8", "--json"],
        ["eval", "--problems", "8", "--samples", "4", "--pass-at", "1", "--pass-at", "4", "--json"],
        ["eval", "--problems", "8", "--kv-budget", "20", "--kv-buffer", "4", "--json"],
        ["doctor", "--json"],
        ["plan", "--json"],
        ["recipes", "--json"],
        ["recipes", "tiny", "--json"],
        ["patch", "show", patch, "--json"],
        ["patch", "verify", "tiny", patch, "--json"],
    ]
    for words in commands:
        assert isinstance(json.loads(run(*words, cwd=tmp_path).stdout), dict), words


def test_steps_that_change_no_weight_say_so_at_once_and_what_to_do(tmp_path: Path) -> None:
    done = run("train", "-o", "run", *SMALL, "--set", "learner.lr=1e-9", cwd=tmp_path, ok=False)
    assert done.returncode == 1
    assert "no weight changed: learner.lr = 1e-09 is too small for bfloat16" in done.stderr
    assert "--set learner.lr=1e-08" in done.stderr


def bad_rows(folder: Path) -> None:
    (folder / "rows.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n{"prompt": "1+\n')
    (folder / "empty.jsonl").write_text("")
    good = "".join(
        json.dumps({"prompt": f"last digit of {n}+1?", "answer": str((n + 1) % 10)}) + "\n" for n in range(60)
    )
    (folder / "good.jsonl").write_text(good)


BAD = {
    "a misspelt key": (["train", "--set", "learner.lrr=1"], "lr"),
    "an unknown section": (["train", "--set", "lerner.lr=1"], "learner"),
    "a wrong type": (["train", "--set", "train.steps=many"], "integer"),
    "an unknown recipe": (["train", "--recipe", "tinny"], "tiny"),
    "a missing recipe file": (["train", "--recipe", "no/such.toml"], "no/such.toml"),
    "a missing data file": (["train", "--data", "missing.jsonl"], "missing.jsonl"),
    "a malformed row": (["train", "--data", "rows.jsonl"], "rows.jsonl:2"),
    "an empty data set": (["train", "--data", "empty.jsonl"], "empty.jsonl"),
    "a missing model": (["train", "--model", "no-such-model"], "no-such-model"),
    "an empty model folder": (["train", "--model", "hollow"], "config.json"),
    "a model that is not safetensors": (["train", "--model", "pickled"], "safetensors"),
    "an unsupported architecture": (["train", "--model", "gpt2"], "'gpt2' is not supported"),
    "a missing patch": (["eval", "--patch", "missing.safetensors"], "missing.safetensors"),
    "pass@k without samples": (["eval", "--pass-at", "4"], "--samples"),
    "eviction without a budget": (["eval", "--eviction", "h2o"], "eviction without kv_budget"),
    "a budget below the window": (["eval", "--kv-budget", "8"], "at least 9"),
    "no place for the result": (["patch", "apply", "tiny", "x"], "--in-place"),
    "no run to resume": (["train", "--resume", "nowhere"], "nowhere"),
    "a plan for an unknown model": (["plan", "no-such-model"], "no-such-model"),
    "a budget that nothing fits": (["train", "--set", "memory.budget=1MiB"], "GiB"),
    "a budget in GB": (["train", "--set", "memory.budget=24GB"], "24GiB"),
    "a response that cannot fit": (["train", "--set", "rollout.max_tokens=100000"], "max_tokens of at most"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name_with_exit_code_2(name: str, tmp_path: Path, tiny_folder: Path) -> None:
    words, expected = BAD[name]
    bad_rows(tmp_path)
    (tmp_path / "hollow").mkdir()
    shutil.copytree(tiny_folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    shutil.copytree(tiny_folder, tmp_path / "gpt2")
    config = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    (tmp_path / "gpt2" / "config.json").write_text(
        json.dumps({**config, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    )
    before = sorted(p.name for p in tmp_path.iterdir())
    assert expected in refused(*words, cwd=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == before  # nothing half-made is left


def test_a_run_folder_that_exists_is_not_touched(trained: Path) -> None:
    before = (trained / "run" / "summary.json").read_bytes()
    assert "--force" in refused("train", "-o", "run", *SMALL, cwd=trained)
    assert (trained / "run" / "summary.json").read_bytes() == before


def test_a_patch_for_another_base_is_told_apart_by_name(
    trained: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    patch = trained / "run" / "patch.safetensors"
    run("patch", "apply", "tiny", patch, "-o", "out", cwd=tmp_path)
    assert "already" in refused("patch", "apply", "out", patch, "-o", "twice", cwd=tmp_path)
    assert "nothing to take off" in refused("patch", "revert", "tiny", patch, "-o", "x", cwd=tmp_path)
    shutil.copytree(tiny_folder, tmp_path / "other")
    weights = tmp_path / "other" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-400_000:] = bytes(400_000)
    weights.write_bytes(data)
    assert "tiny" in refused("patch", "apply", "other", patch, "-o", "x", cwd=tmp_path)
    assert "'tiny'" in refused("eval", "--model", "other", "--patch", patch, cwd=tmp_path)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(patch.read_bytes()[:-5])
    assert "damaged" in refused("patch", "apply", "tiny", torn, "-o", "x", cwd=tmp_path)


def test_a_resumed_run_keeps_its_recipe(trained: Path) -> None:
    assert "learner.lr" in refused("train", "--resume", "run", "--set", "learner.lr=0.1", cwd=trained)


def test_data_of_ones_own_goes_through_a_field_mapping(tmp_path: Path) -> None:
    rows = [{"question": f"last digit of {n}+7+2?", "label": f"so #### {(n + 9) % 10}"} for n in range(60)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    mapping = ["data.prompt=question", "data.answer=label", 'data.answer_after="####"', "data.heldout=10"]
    words = [word for key in mapping for word in ("--set", key)]
    small = ["--set", "train.steps=1", "--set", "rollout.prompts=4"]
    done = run("train", "--data", "own.jsonl", "-o", "run", *words, *small, "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["accuracy_after"]["problems"] == 10


@pytest.mark.skipif(sys.platform != "linux", reason="needs a small file system: mount -t tmpfs")
def test_a_full_disk_leaves_a_run_that_can_be_read_and_resumed(trained: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", small], check=False, capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        done = run("train", "-o", "small/run", *SMALL, "--set", "train.steps=40", cwd=tmp_path, ok=False)
        assert done.returncode == 1
        assert "no space left" in done.stderr
        assert "--resume small/run" in done.stderr
        shutil.copytree(small / "run", tmp_path / "run")
    finally:
        subprocess.run(["umount", small], check=True)
    run("train", "--resume", "run", "--set", "train.steps=3", cwd=tmp_path) if _steps(tmp_path) < 3 else None
    assert _steps(tmp_path) >= 1


def _steps(folder: Path) -> int:
    return len(list((folder / "run" / "journal").glob("*.safetensors")))


def test_on_a_terminal_there_is_a_live_table(tmp_path: Path) -> None:
    import pty

    leader, follower = pty.openpty()
    words = [sys.executable, "-m", "frugal_rl", "train", "-o", "run", *SMALL]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(FOLDER.parent),
        "TERM": "xterm",
        "COLUMNS": "100",
    }
    process = subprocess.Popen(words, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=follower)
    os.close(follower)
    seen = b""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # the other end is closed: the process has ended
            break
        if not chunk:
            break
        seen += chunk
    os.close(leader)
    assert process.wait(timeout=60) == 0
    text = seen.decode("utf-8", "replace")
    for word in ("step 3/3", "groups without signal", "changed entries", "peak memory", "left", "▁"):
        assert word in text or word == "▁", word
    assert "\x1b[" in text


def test_the_last_lines_name_a_better_step_if_there_was_one(tmp_path: Path) -> None:
    small = [*SMALL, "--set", "train.eval_every=1", "--set", "learner.lr=0.3", "--set", "train.steps=4"]
    done = run("train", "-o", "run", *small, cwd=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    best = max(rows, key=lambda row: (row["accuracy"]["value"], -row["step"]))["step"]
    assert ("patch at run --step" in done.stdout) == (0 < best < 4)
