"""Arms of a comparison, each a recipe but for its learner: run, choose learning rates, and tabulate.

An arm gets the same number of runs as any other: one for each learning rate of its grid, all on the first
seed, then the best rate on the other seeds. Best is the highest mean training reward over the second half
of the steps; the held-out problems are not asked. A best rate at the edge of its grid is said.

Each run is a process of its own (`frugal-rl train`), so that peaks of memory are its own, in a folder that
is named after it. A finished run is not run again. An unfinished one goes on where plain SGD is trained,
and is begun anew elsewhere. A run that fails is named, and the others go on. The folder is locked for as long
as a run is at work in it, also one that a killed comparison left behind.

    OUT/ARM/lr-LR-seed-N/       a run folder each, and beside it what it printed
    OUT/compare.json, compare.md, compare.html, compare.svg
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .arms import Arm
from .config import Recipe, load_recipe
from .errors import InputError
from .paired import accuracy, difference

FIXED = ("learner.kind", "learner.lr", "learner.rank", "learner.momentum", "model.weights", "train.seed")
EVALUATIONS = 6  # of a run, where the recipe does not say how often
PHASES = ("generate", "verify", "learn")
REACHED = 0.95  # of the best arm's accuracy: what "steps to" counts up to

Say = Callable[[str], None]


@dataclass(frozen=True)
class Study:
    """What is compared. `recipe`: a name or a .toml file; `grids`: learning rates by arm, equally many."""

    recipe: str
    overrides: tuple[str, ...]
    arms: tuple[Arm, ...]
    grids: Mapping[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    folder: Path

    def run(self, arm: Arm, lr: float, seed: int) -> Run:
        changes = [*self.overrides, *arm.overrides(), f"learner.lr={lr!r}", f"train.seed={seed}"]
        return Run(
            arm, lr, seed, self.recipe, tuple(changes), self.folder / arm.folder / f"lr-{lr:g}-seed-{seed}"
        )


@dataclass(frozen=True)
class Run:
    """One training run of an arm."""

    arm: Arm
    lr: float
    seed: int
    recipe: str
    overrides: tuple[str, ...]
    folder: Path

    def resolved(self) -> Recipe:
        return load_recipe(self.recipe, self.overrides)

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")

    @property
    def finished(self) -> bool:
        """Raises InputError where the folder is of another recipe."""
        written = self.folder / "recipe.toml"
        if not written.exists():
            return False
        if written.read_text(encoding="utf-8") != self.resolved().to_toml():
            raise InputError(
                f"{self.folder} is a run of another recipe than this comparison's: take another folder with "
                "-o, or delete it"
            )
        summary = read_json(self.folder / "summary.json")
        return summary is not None and summary["accuracy_after"] is not None

    def command(self) -> list[str]:
        """Arguments of frugal-rl that begin it."""
        changes = [part for change in self.overrides for part in ("--set", change)]
        return ["train", "--recipe", self.recipe, *changes, "-o", str(self.folder)]

    def further(self) -> list[str]:
        """Arguments that begin it, go on with it, or begin it anew."""
        if not self.folder.exists():
            return self.command()
        if self.arm.kind == "sgd":
            return ["train", "--resume", str(self.folder)]
        return [*self.command(), "--force"]

    def reward(self) -> float:
        """Mean training reward over the second half of the steps; minus infinity if it did not finish."""
        rows = self.metrics() if self.finished else []
        late = [row["reward"] for row in rows[len(rows) // 2 :]]
        return sum(late) / len(late) if late else float("-inf")

    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "metrics.jsonl")


def read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def make_study(
    recipe: str,
    overrides: Sequence[str],
    arms: Sequence[str],
    grids: Sequence[str],
    seeds: int,
    folder: Path,
    hidden: Callable[[str], int],
) -> Study:
    """Check what was asked for, before anything runs. `hidden`: a model's width by its name.

    Raises InputError.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in FIXED:
            raise InputError(f"--set {override}: a comparison sets {key} itself (--arms, --lr-grid, --seeds)")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: name a folder with -o")
    parsed = [Arm.parse(text) for text in arms]
    names = [arm.name for arm in parsed]
    if len(set(names)) != len(names) or len(names) < 2:
        raise InputError(f"--arms {','.join(arms)}: expected at least two arms, each once")
    config = load_recipe(recipe, overrides)
    changes = list(overrides)
    if config.train.eval_every is None:
        changes.append(f"train.eval_every={max(1, config.train.steps // EVALUATIONS)}")
    given = dict(_read_grid(text, names) for text in grids)
    width = 1 if given.keys() >= set(names) else hidden(config.model.name)
    chosen = {arm.name: given.get(arm.name) or arm.default_grid(config.learner.lr, width) for arm in parsed}
    sizes = {name: len(grid) for name, grid in chosen.items()}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(f"each arm gets the same number of runs, but the grids have: {shown} (--lr-grid)")
    first = config.train.seed
    study = Study(recipe, tuple(changes), tuple(parsed), chosen, tuple(range(first, first + seeds)), folder)
    for arm in parsed:
        load_recipe(
            recipe, study.run(arm, chosen[arm.name][0], first).overrides
        )  # every pair of keys is allowed
    return study


def _read_grid(text: str, names: Sequence[str]) -> tuple[str, tuple[float, ...]]:
    head, equals, tail = text.partition("=")
    expected = "expected ARM=LR,LR,... such as adamw=1e-5,1e-4"
    if not equals:
        raise InputError(f"--lr-grid {text}: {expected}")
    name = Arm.parse(head).name
    if name not in names:
        raise InputError(f"--lr-grid {text}: {name} is not among the arms: {', '.join(names)}")
    try:
        rates = tuple(sorted({float(part) for part in tail.split(",")}))
    except ValueError as error:
        raise InputError(f"--lr-grid {text}: {expected}") from error
    if not all(0 < rate < float("inf") for rate in rates):
        raise InputError(f"--lr-grid {text}: expected learning rates above 0")
    return name, rates


def run_all(study: Study, say: Say, failed: dict[str, str]) -> None:
    """Run what is not finished yet. Why a run failed goes to `failed`, by its folder.

    A KeyboardInterrupt stops the present run after its step, and goes on up. Raises InputError before
    anything runs where a folder is of another recipe.
    """
    for arm in study.arms:
        for lr in study.grids[arm.name]:
            for seed in study.seeds:
                study.run(arm, lr, seed).finished  # noqa: B018 (refuses here)
    with _locked(study.folder) as lock:
        _run_all(study, say, failed, lock)


def _run_all(study: Study, say: Say, failed: dict[str, str], lock: int) -> None:
    total = len(study.arms) * (len(study.grids[study.arms[0].name]) + len(study.seeds) - 1)
    done = 0

    def one(run: Run) -> None:
        nonlocal done
        done += 1
        name = f"[{done}/{total}] {run.arm.name} lr {run.lr:g} seed {run.seed}"
        if run.finished:
            say(f"{name}: finished before")
            return
        why = _execute(run, lock)
        if why is None:
            score, rows = read_json(run.folder / "summary.json"), run.metrics()
            assert score is not None
            say(f"{name}: {score['accuracy_after']['value']:.1%} after {len(rows)} steps")
        else:
            failed[str(run.folder)] = why
            say(f"{name}: failed, {why} (see {run.log})")

    for arm in study.arms:
        for lr in study.grids[arm.name]:
            one(study.run(arm, lr, study.seeds[0]))
    for arm in study.arms:
        best = best_rate(study, arm)
        for seed in study.seeds[1:]:
            if best is None:
                done += 1
            else:
                one(study.run(arm, best, seed))


def best_rate(study: Study, arm: Arm) -> float | None:
    """The rate with the highest reward on the first seed; None if none of the arm's runs finished."""
    rewards = {lr: study.run(arm, lr, study.seeds[0]).reward() for lr in study.grids[arm.name]}
    best = max(rewards, key=lambda lr: rewards[lr])
    return best if rewards[best] > float("-inf") else None


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Hold the folder; the descriptor keeps it held in a process that inherits it. Raises InputError."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder}: another comparison, or a run that one left behind, is at work here; wait for it "
                "to end, or end it"
            ) from None
        yield descriptor
    finally:
        os.close(descriptor)


def _execute(run: Run, lock: int) -> str | None:
    """Train in a process of its own, which holds the lock too. Returns why it failed."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "frugal_rl", *run.further()]
    with open(run.log, "a", encoding="utf-8") as log:
        # a group of its own: Ctrl-C reaches this process alone, which passes it on once
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=log, process_group=0, pass_fds=[lock]
        )
        try:
            process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            try:
                process.wait()
            except KeyboardInterrupt:
                process.kill()
                process.wait()
            raise
    if process.returncode == 0:
        return None
    lines = [x for x in run.log.read_text(encoding="utf-8", errors="replace").splitlines() if x.strip()]
    return f"exit code {process.returncode}: {lines[-1] if lines else 'it printed nothing'}"


# --- what came of it


def results(study: Study, failed: Mapping[str, str]) -> dict[str, Any]:
    """Everything that the table shows, and the curves. An arm of which no seed finished has `error` alone."""
    arms = {arm.name: _arm(study, arm, failed) for arm in study.arms}
    first = next((a.name for a in study.arms if "error" not in arms[a.name]), None)
    done = {name: value for name, value in arms.items() if "error" not in value}
    target = max((v["accuracy"]["value"] for v in done.values()), default=0.0) * REACHED
    for value in done.values():
        value["reached"] = _reached(value["runs"], target)
        if first is not None and value is not arms[first]:
            value["against"] = _against(value["runs"], arms[first]["runs"], first)
    for value in done.values():
        for run in value["runs"]:
            del run["correct"], run["correct_applied"]
    return {
        "recipe": study.recipe,
        "overrides": list(study.overrides),
        "seeds": list(study.seeds),
        "reference": first,
        "target_accuracy": target,
        "arms": arms,
        "failed": dict(failed),
    }


def _arm(study: Study, arm: Arm, failed: Mapping[str, str]) -> dict[str, Any]:
    first, grid = study.seeds[0], []
    for lr in study.grids[arm.name]:
        run = study.run(arm, lr, first)
        summary = read_json(run.folder / "summary.json") if run.finished else None
        grid.append(
            {
                "lr": lr,
                "reward": run.reward() if summary else None,
                "accuracy": summary["accuracy_after"] if summary else None,
                "error": None if summary else failed.get(str(run.folder), "not finished"),
            }
        )
    best = best_rate(study, arm)
    if best is None:
        return {"error": grid[0]["error"], "grid": grid}
    runs = [study.run(arm, best, seed) for seed in study.seeds]
    seen = [_run(run) for run in runs if run.finished]
    summaries = [run["summary"] for run in seen]
    parts = {key: [s[key] for s in summaries] for key in _SUMMED if key in summaries[0]}
    trained = np.array([run["correct"] for run in seen])
    applied = np.array([run["correct_applied"] for run in seen])
    rates = study.grids[arm.name]
    by_seed = parts | {key: [run[key] for run in seen] for key in _MEASURED}
    found = {
        "kind": arm.kind,
        "weights": arm.weights,
        "lr": best,
        "edge": len(rates) > 1 and best in (rates[0], rates[-1]),
        "grid": grid,
        "seeds_finished": [run["seed"] for run in seen],
        "accuracy": asdict(accuracy(trained)),
        "applied": asdict(accuracy(applied)),
        "applied_less_trained": asdict(difference(applied, trained).interval),
        "parameters": summaries[0]["parameters"],
        **{key: sum(values) / len(values) for key, values in by_seed.items()},
        "span": {key: [min(values), max(values)] for key, values in by_seed.items()},
        "gradient_bytes": summaries[0]["plan"]["learning"].get("gradients", 0),
        "plan": {key: summaries[0]["plan"][key] for key in ("generating", "learning")},
        "phase_peak_bytes": {phase: _phase_peak(seen, phase) for phase in PHASES},
        "runs": seen,
    }
    for one in seen:
        del one["summary"], one["steps"]
    return found


def _phase_peak(runs: Sequence[Mapping[str, Any]], phase: str) -> float | None:
    """Of all steps the most, mean over the runs; None where it is unknown of a step."""
    most = []
    for run in runs:
        peaks = [row["phase_peak_bytes"][phase] for row in run["steps"]]
        if None in peaks:
            return None
        most.append(max(peaks))
    return sum(most) / len(most)


_SUMMED = (
    "changed_any",
    "changed_1e5",
    "patch_bytes",
    "adapter_bytes",
    "merge_lost",
    "export_lost",
    "train_seconds",
    "weights_bytes",
    "optimizer_bytes",
    "peak_memory_bytes",
)
_MEASURED = ("mean_reward", "tokens_per_s", *(f"{phase}_seconds" for phase in PHASES))


def _run(run: Run) -> dict[str, Any]:
    summary, rows = read_json(run.folder / "summary.json"), run.metrics()
    assert summary is not None
    seconds = np.concatenate([[0.0], np.cumsum([row["seconds"] for row in rows])])
    validations = read_lines(run.folder / "validation.jsonl")
    correct = [int(x) for x in validations[-1]["correct"]]
    return {
        "seed": run.seed,
        "folder": str(run.folder),
        "command": shlex.join(["frugal-rl", *run.command()]),
        "curve": [
            {
                "step": row["step"],
                "seconds": float(seconds[row["step"]]),
                "accuracy": row["accuracy"]["value"],
            }
            for row in validations
        ],
        "rewards": [row["reward"] for row in rows],
        "mean_reward": sum(row["reward"] for row in rows) / len(rows),
        "tokens_per_s": sum(row["generated_tokens"] for row in rows)
        / sum(row["phase_seconds"]["generate"] for row in rows),
        **{f"{p}_seconds": sum(row["phase_seconds"][p] for row in rows) / len(rows) for p in PHASES},
        "correct": correct,
        "correct_applied": [int(x) for x in summary.get("exported_correct", "")] or correct,
        "summary": summary,
        "steps": rows,
    }


def _reached(runs: Sequence[Mapping[str, Any]], target: float) -> dict[str, Any]:
    """Means over the seeds of the first evaluation at the target; None where a seed never came there."""
    firsts = [next((p for p in run["curve"] if p["accuracy"] >= target), None) for run in runs]
    reached = [point for point in firsts if point is not None]
    if len(reached) < len(runs):
        return {"step": None, "seconds": None, "seeds": len(reached), "span": {}}
    found = {key: [point[key] for point in reached] for key in ("step", "seconds")}
    means = {key: sum(values) / len(values) for key, values in found.items()}
    span = {key: [min(values), max(values)] for key, values in found.items()}
    return {**means, "seeds": len(reached), "span": span}


def _against(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], name: str
) -> dict[str, Any]:
    """Ours less theirs over the seeds that both finished."""
    by_seed = {run["seed"]: run["correct"] for run in theirs}
    pairs = [(run["correct"], by_seed[run["seed"]]) for run in ours if run["seed"] in by_seed]
    if not pairs:
        return {"reference": name, "error": "no seed that both finished"}
    found = difference(np.array([a for a, _ in pairs]), np.array([b for _, b in pairs]))
    return {
        "reference": name,
        **asdict(found.interval),
        "mcnemar_p": list(found.mcnemar),
        "verdict": found.verdict,
        "seeds": len(pairs),
    }
