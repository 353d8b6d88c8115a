"""Sinks: the names, the order, going on, failing without harm. The services themselves are made here."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from frugal_rl import sinks
from frugal_rl.config import Recipe, load_recipe
from frugal_rl.errors import InputError
from frugal_rl.journal import Journal
from frugal_rl.sinks import check_sink, open_sink, train_values

from .test_cli import SMALL, refused, run
from .test_journal import step_patch

Sent = list[tuple[int, dict[str, float]]]
ROW = {
    "step": 3,
    "reward": 0.5,
    "reward_std": 0.25,
    "reward/math": 0.4,
    "groups": 8,
    "signal_groups": 6,
    "response_tokens": 12.5,
    "longest_tokens": 40,
    "truncated": 0.1,
    "loss": None,
    "gradient_norm": 1.5,
    "dropped": "not finite",
    "verdicts": {"correct": 3},
    "phase_seconds": {"learn": 1.25},
    "seconds": 2.0,
}


def recipe_of(kind: str | None) -> Recipe:
    return load_recipe("tiny", [f"train.log={kind}"] if kind else [])


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> tuple[Sent, list[int]]:
    """What a made service was sent, and the first steps it was opened with."""
    sent: Sent = []
    opened: list[int] = []

    def made(folder: Path, recipe: Recipe, first: int) -> tuple[sinks.Write, sinks.Close]:
        opened.append(first)
        return lambda step, values: sent.append((step, values)), lambda: sent.append((-1, {}))

    monkeypatch.setitem(sinks.OPEN, "tensorboard", made)
    return sent, opened


def commit(journal: Journal, number: int) -> None:
    journal.commit(step_patch(number), 32 * number, {**ROW, "step": number})


def test_a_steps_numbers_have_the_names_that_trl_gives_them() -> None:
    values = train_values(ROW, recipe_of(None))
    assert values == {
        "train/learning_rate": 0.01,
        "train/reward": 0.5,
        "train/reward_std": 0.25,
        "train/rewards/math/mean": 0.4,
        "train/frac_reward_zero_std": 0.25,
        "train/groups": 8.0,
        "train/signal_groups": 6.0,
        "train/completions/mean_length": 12.5,
        "train/completions/max_length": 40.0,
        "train/completions/clipped_ratio": 0.1,
        "train/grad_norm": 1.5,
        "train/verdicts/correct": 3.0,
        "train/phase_seconds/learn": 1.25,
        "train/step_time": 2.0,
    }


def test_steps_and_evaluations_are_sent_once_in_order(
    tmp_path: Path, service: tuple[Sent, list[int]]
) -> None:
    sent, _ = service
    journal = Journal.create(tmp_path / "run", recipe_of(None), force=False)
    with open_sink(recipe_of("tensorboard"), journal, print) as send:
        journal.validate(0, {"value": 0.25, "low": 0.2, "high": 0.3, "problems": 500})
        for number in (1, 2, 3):
            commit(journal, number)
            send()
            if number == 2:
                journal.validate(2, {"value": 0.5})
        journal.validate(3, {"value": 0.75})
    assert [step for step, _ in sent] == [0, 1, 2, 2, 3, 3, -1]
    assert sent[0][1] == {"eval/accuracy": 0.25, "eval/accuracy_low": 0.2, "eval/accuracy_high": 0.3}
    assert sent[3][1] == {"eval/accuracy": 0.5}


def test_a_run_that_goes_on_sends_its_next_step(tmp_path: Path, service: tuple[Sent, list[int]]) -> None:
    sent, opened = service
    journal = Journal.create(tmp_path / "run", recipe_of(None), force=False)
    journal.validate(0, {"value": 0.25})
    commit(journal, 1)
    commit(journal, 2)
    again, _ = Journal.open(tmp_path / "run")
    list(again.replay())
    again.restore()
    with open_sink(recipe_of("tensorboard"), again, print) as send:
        commit(again, 3)
        send()
    assert opened == [3]
    assert [step for step, _ in sent] == [3, -1]


@pytest.mark.parametrize("when", ["open", "write", "close"])
def test_a_sink_that_fails_is_said_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    said: list[str] = []

    def fail(*_: Any) -> None:
        raise ConnectionError("made here")

    def made(*_: Any) -> tuple[sinks.Write, sinks.Close]:
        if when == "open":
            fail()
        return fail if when == "write" else (lambda *_: None), fail if when == "close" else (lambda: None)

    monkeypatch.setitem(sinks.OPEN, "wandb", made)
    journal = Journal.create(tmp_path / "run", recipe_of(None), force=False)
    with open_sink(recipe_of("wandb"), journal, said.append) as send:
        for number in (1, 2, 3):
            commit(journal, number)
            send()
    assert len(said) == 1 and "wandb" in said[0] and "made here" in said[0]


def test_without_a_sink_nothing_is_opened(tmp_path: Path, service: tuple[Sent, list[int]]) -> None:
    journal = Journal.create(tmp_path / "run", recipe_of(None), force=False)
    with open_sink(recipe_of(None), journal, print) as send:
        commit(journal, 1)
        send()
    assert service == ([], [])


def test_a_package_that_is_not_there_is_named_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install trackio"):
        check_sink("trackio")
    check_sink(None)


class Service(ModuleType):
    """As much of wandb and trackio as is used: `init` with a run that has `log` and `finish`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []

    def init(self, **options: Any) -> Service:
        print("a greeting")
        self.calls.append(("init", options))
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append(("log", step))

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_a_service_knows_a_run_again_by_what_is_in_its_folder(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Service(kind)
    monkeypatch.setitem(sys.modules, kind, module)
    journal = Journal.create(tmp_path / "run", recipe_of(None), force=False)
    for number in (1, 2):
        with open_sink(recipe_of(kind), journal, print) as send:
            commit(journal, number)
            send()
    options = [given for name, given in module.calls if name == "init"]
    identity = json.loads((tmp_path / "run" / "log.json").read_text())["id"]
    key = "id" if kind == "wandb" else "name"
    assert options[0][key] == options[1][key] and options[0][key].endswith(identity)
    assert options[0]["resume"] == "allow" and options[0]["config"]["learner"]["lr"] == 0.01
    assert [step for name, step in module.calls if name == "log"] == [1, 2]
    assert capsys.readouterr().out == ""  # standard output is for the summary


def test_an_unknown_sink_is_refused_by_name(tmp_path: Path) -> None:
    assert '"tensorboard", "trackio", "wandb"' in refused("train", "--log", "mlflow", cwd=tmp_path)


def events(folder: Path) -> Callable[[str], list[int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return lambda name: [event.step for event in found.Scalars(name)]


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="needs the package tensorboard")
def test_tensorboard_has_every_step_once_after_a_run_went_on(tmp_path: Path) -> None:
    run("train", "-o", "run", *SMALL, "--log", "tensorboard", cwd=tmp_path)
    (tmp_path / "run" / "journal" / "00000003.safetensors").unlink()  # as if it had been lost
    run("train", "--resume", "run", "--set", "train.steps=4", cwd=tmp_path)
    steps = events(tmp_path / "run")
    assert steps("train/reward") == [1, 2, 3, 4]
    assert steps("eval/accuracy")[0] == 0
