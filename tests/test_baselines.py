"""The baselines against torch's and peft's own, on one batch, and through the whole loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from frugal_rl import baselines, checkpoint
from frugal_rl import train as loop
from frugal_rl.baselines import Dense, optimizer, require
from frugal_rl.config import load_recipe
from frugal_rl.decoder import Decoder
from frugal_rl.errors import FrugalError, InputError
from frugal_rl.journal import Journal
from frugal_rl.learn import Learner
from frugal_rl.patch import Patch
from frugal_rl.rollout import Rollout
from frugal_rl.session import open_session
from frugal_rl.storage import bits_of
from frugal_rl.weights import Weights

from .conftest import make_config, make_decoder, make_model, make_rollouts, save_folder, weights_of
from .test_learn import TEMPERATURE, policy_gradient, slow_log_probs

QUIET = loop.Reporter(lambda text: None, lambda row: None)
SMALL = ["rollout.prompts=4", "rollout.samples=4", "data.heldout=8", "train.steps=2", "rollout.max_tokens=24"]
ADVANTAGES = torch.linspace(-1, 1, 7)


def learner_of(decoder: Decoder, baseline: Any, lr: float = 0.1, clip: float | None = 1.0) -> Learner:
    return Learner(decoder, lr, clip, TEMPERATURE, micro_tokens=100, baseline=baseline)


def by_hand(model: Any, rollouts: list[Rollout], optimiser: Any, clip: float) -> float:
    """What a plain training script does with these rollouts. Returns the norm."""
    optimiser.zero_grad()
    total = sum(-slow_log_probs(model, r).sum() * a for r, a in zip(rollouts, ADVANTAGES, strict=True))
    (total / len(rollouts)).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimiser.step()
    return float(norm)


def worst_update_error(model: Any, weights: Weights, before: dict[str, Tensor]) -> float:
    """Largest over the tensors: of the update, relative to its norm."""
    errors = []
    for name, tensor in weights.tensors.items():
        expected = model.state_dict()[name]
        errors.append(float((tensor - expected).norm() / (expected - before[name]).norm()))
    return max(errors)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["adamw", "sgd-momentum"])
def test_two_steps_are_torchs_optimizer_with_clip_grad_norm(kind: str, tied: bool) -> None:
    """Two, so that moments count; clipped, and with rows of the embedding that never occur."""
    model, decoder = make_decoder("qwen2", tied=tied)
    before = {k: v.clone() for k, v in decoder.weights.tensors.items()}
    learner = learner_of(decoder, Dense(decoder.weights, optimizer(kind, 1e-3), 2.0))
    twin = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0),
        "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    }[kind](model.parameters())
    for seed in (0, 1):
        rollouts = make_rollouts(7, seed)
        step = learner.step(rollouts, policy_gradient(ADVANTAGES))
        norm = by_hand(model, rollouts, twin, 2.0)
        assert step.commit.norm == pytest.approx(norm, rel=1e-5)
        assert step.commit.scale < 1
    # Adam divides by the gradient's size: an entry whose gradient is 1e-8 of the largest has its error too
    assert worst_update_error(model, decoder.weights, before) < {"adamw": 1e-2, "sgd-momentum": 2e-4}[kind]


def test_the_optimizers_settings_are_trls() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    group = optimizer("adamw", 1e-6)([parameter]).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-6, (0.9, 0.999), 1e-8, 0)
    transformers = pytest.importorskip("transformers")
    fields = transformers.TrainingArguments.__dataclass_fields__
    theirs = [fields[k].default for k in ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")]
    assert theirs == [0.9, 0.999, 1e-8, 0.0]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_sgd_through_the_baselines_path_is_our_learner(kind: str) -> None:
    """Float32 weights and momentum 0, three steps: the same numbers up to one rounding of lr * c * g."""
    _, ours = make_decoder(kind)
    _, theirs = make_decoder(kind)
    plain = learner_of(ours, None, lr=0.05)
    dense = learner_of(theirs, Dense(theirs.weights, optimizer("sgd-momentum", 0.05, 0.0), 1.0))
    for seed in range(3):
        rollouts = make_rollouts(7, seed)
        steps = [x.step(rollouts, policy_gradient(ADVANTAGES)) for x in (plain, dense)]
        assert steps[0].commit.norm == pytest.approx(steps[1].commit.norm, rel=1e-6)
    for name, tensor in ours.weights.tensors.items():
        error = float((tensor - theirs.weights.tensors[name]).norm() / tensor.norm())
        assert error < 1e-6, name


def test_sgds_first_bf16_step_through_the_baselines_path_changes_the_same_bits() -> None:
    _, ours = make_decoder("qwen2", dtype=torch.bfloat16)
    _, theirs = make_decoder("qwen2", dtype=torch.bfloat16)
    rollouts = make_rollouts(7)
    one = learner_of(ours, None, lr=0.01).step(rollouts, policy_gradient(ADVANTAGES))
    dense = Dense(theirs.weights, optimizer("sgd-momentum", 0.01, 0.0), 1.0)
    other = learner_of(theirs, dense).step(rollouts, policy_gradient(ADVANTAGES))
    differ = sum(
        int((bits_of(t) != bits_of(theirs.weights.tensors[n])).sum()) for n, t in ours.weights.tensors.items()
    )
    assert one.commit.entries > 1000
    assert differ <= one.commit.entries * 1e-3  # ties between two bf16 neighbours
    assert other.commit.entries == pytest.approx(one.commit.entries, abs=differ)


def test_the_masters_keep_what_rounding_takes_from_the_weights() -> None:
    """Steps that are each below half a unit in the last place add up in the masters."""
    weights = Weights({"w": torch.full((4, 4), 1.0, dtype=torch.bfloat16)})  # the next bf16 is 1 + 2 ** -7
    dense = Dense(weights, optimizer("sgd-momentum", 2.0**-10, 0.0), None)
    changed = []
    for _ in range(8):
        update = dense.begin()
        update.propose("w", -torch.ones(4, 4))
        changed.append(update.commit().entries)
    assert changed == [0, 0, 0, 0, 16, 0, 0, 0]
    assert torch.equal(dense.masters["w"], torch.full((4, 4), 1.0 + 2.0**-7))


def test_8_bit_moments_follow_float32_moments() -> None:
    """bitsandbytes' states have 8 bits: over ten steps the two walk the same way, and not the same steps."""
    walked = {}
    for kind in ("adamw", "adamw8bit"):
        weights = Weights({"w": torch.zeros(128, 64), "small": torch.zeros(64)})
        dense = Dense(weights, optimizer(kind, 1e-3), None)
        for seed in range(10):
            gradient = torch.randn(128, 64, generator=torch.Generator().manual_seed(seed)) + 0.5
            update = dense.begin()
            update.propose("w", gradient)
            update.propose("small", gradient[0].clone())
            update.commit()
        walked[kind] = weights.tensors["w"].clone()
        states = {
            v.dtype
            for v in dense.optimizer.state[dense.masters["w"]].values()
            if v is not None and isinstance(v, Tensor) and v.numel() == 128 * 64
        }
        assert states == {torch.float32 if kind == "adamw" else torch.uint8}
    error = float((walked["adamw"] - walked["adamw8bit"]).norm() / walked["adamw"].norm())
    assert 0 < error < 0.05


def untouched(dense: Dense) -> bool:
    """Every moment and count of steps is 0."""
    return not any(torch.as_tensor(v).any() for s in dense.optimizer.state.values() for v in s.values())


@pytest.mark.parametrize("kind,entry_bytes", [("adamw", 8), ("adamw8bit", 2), ("sgd-momentum", 4)])
def test_the_states_are_there_before_the_first_step_and_none_comes_with_it(
    kind: str, entry_bytes: int
) -> None:
    weights = Weights({"w": torch.ones(128, 64, dtype=torch.bfloat16)})
    dense = Dense(weights, optimizer(kind, 0.1), None)
    before = dense.nbytes
    # 8-bit states have scales and a table of values besides
    assert before == pytest.approx((4 + entry_bytes) * 128 * 64, rel=0.1)
    update = dense.begin()
    update.propose("w", torch.randn(128, 64))
    assert update.commit().entries
    assert dense.nbytes == before


def test_a_zero_gradient_moves_nothing_not_even_the_count_of_steps() -> None:
    weights = Weights({"w": torch.ones(4, 4)})
    dense = Dense(weights, optimizer("adamw", 1.0), 1.0)
    update = dense.begin()
    update.propose("w", torch.zeros(4, 4))
    assert update.commit().entries == 0
    assert untouched(dense)
    assert torch.equal(weights.tensors["w"], torch.ones(4, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_drops_the_step(bad: float) -> None:
    weights = Weights({"w": torch.ones(4, 4)})
    dense = Dense(weights, optimizer("adamw", 1.0), 1.0)
    update = dense.begin()
    update.propose("w", torch.full((4, 4), bad))
    commit = update.commit()
    assert commit.dropped is not None and "norm" in commit.dropped
    assert torch.equal(weights.tensors["w"], torch.ones(4, 4))
    assert untouched(dense)


def test_out_of_memory_in_the_optimizer_ends_the_run_and_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = Weights({"w": torch.ones(4, 4)})
    dense = Dense(weights, optimizer("adamw", 1.0), 1.0)

    def step() -> None:
        raise torch.OutOfMemoryError("made here")

    monkeypatch.setattr(dense.optimizer, "step", step)
    update = dense.begin()
    update.propose("w", torch.ones(4, 4))
    with pytest.raises(FrugalError, match="cannot go on"):
        update.commit()


def test_a_missing_package_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(baselines.PACKAGES, "lora", "no_such_package_here")
    with pytest.raises(InputError, match="pip install no_such_package_here"):
        require("lora")


# --- through the loop


def run(tmp_path: Path, *changes: str) -> tuple[dict[str, Any], Path, dict[str, Tensor]]:
    recipe = load_recipe("tiny", [*SMALL, *changes])
    folder = tmp_path / "run"
    with open_session(recipe, QUIET, device=torch.device("cpu")) as session:
        journal = Journal.create(folder, recipe, force=False)
        summary = loop.train(session, journal, QUIET, lambda: False)
        policy = {k: v.clone() for k, v in session.policy.weights.tensors.items()}
    return summary, folder, policy


@pytest.mark.parametrize(
    "kind,lr,minibatches",
    [("adamw", "1e-4", 1), ("adamw", "1e-4", 2), ("adamw8bit", "1e-4", 1), ("sgd-momentum", "1e-3", 1)],
)
def test_a_runs_patch_makes_the_checkpoint_its_policy_bit_for_bit(
    kind: str, lr: str, minibatches: int, tmp_path: Path, tiny_folder: Path
) -> None:
    changes = [f"learner.kind={kind}", f"learner.lr={lr}", f"learner.minibatches={minibatches}"]
    summary, folder, policy = run(tmp_path, *changes)
    patch = Patch.load(folder / "patch.safetensors")
    assert sum(len(t.positions) for t in patch.tensors.values()) == summary["changed_any"] > 0
    checkpoint.apply(tiny_folder, folder / "patch.safetensors", tmp_path / "trained")
    trained = checkpoint.Checkpoint(tmp_path / "trained")
    for name, tensor in policy.items():
        got = torch.from_numpy(trained.bits(name).view("i2").copy())
        assert torch.equal(got, bits_of(tensor)), name
    # the journal's steps lead there too
    journal, recipe = Journal.open(folder)
    session_of = open_session(recipe, QUIET, device=torch.device("cpu"))
    # the masters would not know of it
    with session_of as session, pytest.raises(InputError, match="cannot go on"):
        loop.resume(session, journal, QUIET)
    with open_session(load_recipe("tiny", SMALL), QUIET, device=torch.device("cpu")) as session:
        for step in journal.replay():
            session.policy.weights.write_patch_(step)
        for name, tensor in policy.items():
            assert torch.equal(bits_of(session.policy.weights.tensors[name]), bits_of(tensor))
    parameters = summary["parameters"]
    least = {"adamw": 12, "adamw8bit": 5.5, "sgd-momentum": 8}[kind] * parameters
    assert least <= summary["optimizer_bytes"] < least * 1.5
    planned = summary["plan"]["learning"]
    assert planned["gradients"] == pytest.approx(4 * parameters, rel=0.02)


def test_the_reference_of_a_dense_run_is_its_checkpoint() -> None:
    changes = [*SMALL, "learner.kind=adamw", "learner.lr=1e-3", "loss.kl=0.1", "loss.max_gap=9"]
    with open_session(load_recipe("tiny", changes), QUIET, device=torch.device("cpu")) as session:
        rollouts = make_rollouts(4, longest=8)
        rollouts = [
            Rollout(tuple(t % 20 for t in r.prompt_ids), r.response_ids % 20, r.logprob_T, False, r.logprob_T)
            for r in rollouts
        ]
        base = session.learner.log_probs(rollouts)
        session.learner.step(rollouts, lambda x: (-x.sum(), {}))
        moved = session.learner.log_probs(rollouts)
        assert not torch.equal(moved, base)
        assert torch.equal(session.learner.reference_log_probs(rollouts), base)
        assert torch.equal(session.learner.log_probs(rollouts), moved)
        overlay = session.policy.weights.overlay
        assert not overlay  # no ten bytes an entry


def test_changed_entries_that_came_back_are_not_counted(tmp_path: Path) -> None:
    model = make_model(make_config("llama"), dtype=torch.bfloat16)
    tiny = Path(__file__).parent.parent / "frugal_rl" / "assets" / "tiny"
    folder = save_folder(model, tmp_path / "model", tiny)
    names = frozenset(weights_of(model).held)
    weights = Weights.from_checkpoint(folder, torch.device("cpu"), name="m", names=names, whole=True)
    tensor = weights.tensors["model.norm.weight"]
    before = tensor.clone()
    tensor[:5] += 1
    assert weights.changed_counts() == (5, 5)
    tensor[:3] = before[:3]
    assert weights.changed_counts() == (2, 2)
    assert weights.difference()["model.norm.weight"].position_N.tolist() == [3, 4]
    with weights.base():
        assert torch.equal(tensor, before)
    assert weights.changed_counts() == (2, 2)


@pytest.mark.parametrize(
    "changes,why",
    [
        (["learner.kind=adamw", "model.weights=int8"], "changes every entry"),
        (["learner.kind=lora", "model.weights=host"], "not streamed"),
        (["learner.kind=adamw", "learner.rank=4"], 'for kind = "lora"'),
        (["learner.momentum=0.9"], 'for kind = "sgd-momentum"'),
        (["learner.kind=sgd-momentum", "learner.momentum=1"], "0.9999"),
    ],
)
def test_what_does_not_go_together_is_refused_before_a_model_is_loaded(changes: list[str], why: str) -> None:
    with pytest.raises(InputError, match=why):
        load_recipe("tiny", changes)


def test_a_baselines_run_cannot_go_on_and_says_so(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from frugal_rl.cli import cli

    _, folder, _ = run(tmp_path, "learner.kind=adamw", "learner.lr=1e-4", "train.steps=1")
    result = CliRunner().invoke(cli, ["train", "--resume", str(folder)])
    assert isinstance(result.exception, InputError)
    assert "'adamw'" in str(result.exception) and "Begin anew" in str(result.exception)
    rows = [json.loads(x) for x in (folder / "validation.jsonl").read_text().splitlines()]
    assert [len(row["correct"]) for row in rows] == [8, 8]
    assert rows[0]["correct"].count("1") == round(rows[0]["accuracy"]["value"] * 8)


def test_the_plan_counts_what_each_kind_holds_and_plain_sgd_holds_nothing(tiny_folder: Path) -> None:
    from frugal_rl.arms import extra_bytes
    from frugal_rl.memory import Shape

    shape = Shape.from_config(json.loads((tiny_folder / "config.json").read_text()))
    _, decoder = make_decoder("qwen2")
    sizes = [sum(t.shape) for n, t in decoder.weights.tensors.items() if "proj.weight" in n]
    small = Shape.from_config(decoder.config.to_dict())
    assert small.linear_ends == sum(sizes)
    parameters = shape.parameters
    assert extra_bytes("sgd", parameters, 2, 7) == (0, 0)
    assert extra_bytes("adamw", parameters, 2, 7) == (12 * parameters, 4 * parameters)
    assert extra_bytes("adamw", parameters, 4, 7) == (8 * parameters, 4 * parameters)  # its own master
    assert extra_bytes("adamw8bit", parameters, 2, 7) == (6 * parameters, 4 * parameters)
    assert extra_bytes("lora", parameters, 2, 7) == (84, 28)


@pytest.mark.parametrize("kind,ends", [("sgd", True), ("adamw", False)])
def test_steps_that_only_the_masters_see_do_not_end_a_run(kind: str, ends: bool, tmp_path: Path) -> None:
    changes = [f"learner.kind={kind}", "learner.lr=1e-12", "train.steps=4", "rollout.prompts=8"]
    if ends:
        with pytest.raises(FrugalError, match="changed nothing"):
            run(tmp_path, *changes)
        return
    summary, _, _ = run(tmp_path, *changes)
    assert (summary["steps"], summary["changed_any"]) == (4, 0)
