"""Where a run's numbers go besides its folder: TensorBoard, trackio or Weights & Biases, if asked for.

metrics.jsonl stays the truth. A sink gets the same numbers under the names that TRL's GRPOTrainer gives them
through transformers (`train/reward`, `train/completions/mean_length`, `eval/...`), so that curves of both lie
in one plot; what TRL has no name for keeps ours (`train/changed_any`). A step is sent after it is in the
journal, and a run that goes on sends its next step: nothing is sent twice, and what TensorBoard has of steps
that were lost is hidden. A sink that fails is left out from then on, said once, and never stops a run.

Source: names, huggingface/trl trl/trainer/grpo_trainer.py (1.16); the prefix, huggingface/transformers
integration_utils.py, rewrite_logs. Differs: no `epoch`; `learning_rate` is constant.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from typing import Any

from .config import Recipe
from .errors import InputError
from .journal import Journal
from .patch import write_atomically

PROJECT = "frugal-rl"  # unless the service's own environment variable names another
NAMES = {
    "response_tokens": "completions/mean_length",
    "shortest_tokens": "completions/min_length",
    "longest_tokens": "completions/max_length",
    "ended_tokens": "completions/mean_terminated_length",
    "truncated": "completions/clipped_ratio",
    "gradient_norm": "grad_norm",
    "clip_share": "clip_ratio/region_mean",
    "sampler_gap": "sampling/sampling_logp_difference/mean",
    "sampler_gap_max": "sampling/sampling_logp_difference/max",
    "seconds": "step_time",
}
EVAL_NAMES = {"value": "eval/accuracy", "low": "eval/accuracy_low", "high": "eval/accuracy_high"}

Values = dict[str, float]
Write = Callable[[int, Values], None]
Close = Callable[[], None]


def check_sink(kind: str | None) -> None:
    """Raises InputError where its package is not installed."""
    if kind is not None and find_spec(kind) is None:
        raise InputError(f'train.log = "{kind}" needs the package {kind}: pip install {kind}')


@contextmanager
def open_sink(recipe: Recipe, journal: Journal, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Gives a function to call after each step: it sends what is new in the journal."""
    kind = recipe.train.log
    if kind is None:
        yield lambda: None
        return
    sink = _Sink(kind, recipe, journal, say)
    try:
        yield sink.send
    finally:
        sink.send()
        sink.close()


class _Sink:
    def __init__(self, kind: str, recipe: Recipe, journal: Journal, say: Callable[[str], None]) -> None:
        self.kind, self.recipe, self.journal, self.say = kind, recipe, journal, say
        self.steps, self.evaluations = len(journal.metrics), len(journal.validations)
        self.write: Write | None = None
        self._close: Close = lambda: None
        self._guarded(self._open)

    def send(self) -> None:
        self._guarded(self._send)

    def close(self) -> None:
        self._guarded(self._close)
        self.write = None

    def _open(self) -> None:
        self.write, self._close = OPEN[self.kind](self.journal.folder, self.recipe, self.steps + 1)

    def _send(self) -> None:
        """In the order of steps: a service may refuse to go back."""
        if self.write is None:
            return
        new = [
            (int(row["step"]), 0, train_values(row, self.recipe))
            for row in self.journal.metrics[self.steps :]
        ]
        new += [
            (
                int(row["step"]),
                1,
                {EVAL_NAMES[k]: float(v) for k, v in row["accuracy"].items() if k in EVAL_NAMES},
            )
            for row in self.journal.validations[self.evaluations :]
        ]
        self.steps, self.evaluations = len(self.journal.metrics), len(self.journal.validations)
        for step, _, values in sorted(new, key=lambda one: one[:2]):
            self.write(step, values)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            with redirect_stdout(sys.stderr):  # standard output is for the summary
                work()
        except Exception as error:  # noqa: BLE001 - whatever another's code raises, the run goes on
            self.write, self._close = None, lambda: None
            why = f"{type(error).__name__}: {error}"
            self.say(f"{self.kind} is left out from here on, metrics.jsonl goes on: {why}")


def train_values(row: Mapping[str, Any], recipe: Recipe) -> Values:
    """A step's numbers by the ecosystem's names; what is None is left out."""
    values: dict[str, Any] = {"learning_rate": recipe.learner.lr}
    for key, value in row.items():
        if key.startswith("reward/"):
            values[f"rewards/{key.removeprefix('reward/')}/mean"] = value
        elif key in ("verdicts", "phase_seconds", "phase_peak_bytes"):
            values |= {f"{key}/{name}": one for name, one in value.items()}
        elif key != "step":
            values[NAMES.get(key, key)] = value
    if row.get("groups"):
        values["frac_reward_zero_std"] = 1 - row["signal_groups"] / row["groups"]
    return {f"train/{k}": float(v) for k, v in values.items() if isinstance(v, (int, float))}


# --- the services


def _tensorboard(folder: Path, recipe: Recipe, first: int) -> tuple[Write, Close]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first if first > 1 else None)
    writer.add_text("recipe", f"```toml\n{recipe.to_toml()}```", first - 1)

    def write(step: int, values: Values) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # a killed run has lost nothing

    return write, writer.close


def _wandb(folder: Path, recipe: Recipe, first: int) -> tuple[Write, Close]:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=folder.resolve().name,
        id=_identity(folder),
        resume="allow",
        dir=str(folder),
        config=asdict(recipe),
    )
    return lambda step, values: run.log(values, step=step), run.finish


def _trackio(folder: Path, recipe: Recipe, first: int) -> tuple[Write, Close]:
    import trackio

    run = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=f"{folder.resolve().name}-{_identity(folder)}",
        resume="allow",
        config=asdict(recipe),
    )
    return lambda step, values: run.log(values, step=step), run.finish


OPEN: dict[str, Callable[[Path, Recipe, int], tuple[Write, Close]]] = {
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "wandb": _wandb,
}


def _identity(folder: Path) -> str:
    """What a service knows the run by: made once, kept in the folder."""
    path = folder / "log.json"
    if not path.exists():
        write_atomically(path, json.dumps({"id": token_hex(4)}).encode())
    return str(json.loads(path.read_text(encoding="utf-8"))["id"])
