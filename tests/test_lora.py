"""Adapters inside the decoder's layers against peft on a whole transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from frugal_rl import checkpoint
from frugal_rl import train as loop
from frugal_rl.baselines import optimizer
from frugal_rl.cli import cli
from frugal_rl.config import load_recipe
from frugal_rl.decoder import Decoder
from frugal_rl.errors import FrugalError
from frugal_rl.generate.engine import Engine
from frugal_rl.journal import Journal
from frugal_rl.learn import Learner
from frugal_rl.lora import Adapters
from frugal_rl.patch import Patch
from frugal_rl.rollout import Request
from frugal_rl.session import open_session
from frugal_rl.storage import Quantised, bits_of
from frugal_rl.weights import Weights

from .conftest import KINDS, make_config, make_decoder, make_model, make_rollouts, save_folder, weights_of
from .test_learn import TEMPERATURE, policy_gradient, slow_log_probs

# peft asks transformers for a name that it will drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
QUIET = loop.Reporter(lambda text: None, lambda row: None)
SMALL = ["rollout.prompts=4", "rollout.samples=4", "data.heldout=8", "train.steps=2", "rollout.max_tokens=24"]
ADVANTAGES = torch.linspace(-1, 1, 7)


def adapted(decoder: Decoder, lr: float = 1e-2, **changes: Any) -> tuple[Learner, Adapters]:
    adapters = Adapters(decoder, optimizer("lora", lr), 1.0, rank=4, seed=1, **changes)
    return Learner(decoder, lr, 1.0, TEMPERATURE, 100, baseline=adapters), adapters


def train(learner: Learner, steps: int = 3) -> None:
    for seed in range(steps):
        learner.step(make_rollouts(7, seed), policy_gradient(ADVANTAGES))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> tuple[Path, Learner, Adapters]:
    """A float32 checkpoint, and adapters trained on it for three steps."""
    model = make_model(make_config("qwen2", tied=False))
    folder = save_folder(model, tmp_path_factory.mktemp("lora") / "model", tiny_folder)
    learner, adapters = adapted(Decoder(make_config("qwen2", tied=False), weights_of(model)))
    train(learner)
    return folder, learner, adapters


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapters_change_nothing_and_sit_on_every_linear_layer(kind: str) -> None:
    _, decoder = make_decoder(kind)
    rollouts = make_rollouts(5)
    before = Learner(decoder, 0.1, 1.0, TEMPERATURE, 100).log_probs(rollouts)
    learner, adapters = adapted(decoder)
    assert torch.equal(learner.log_probs(rollouts), before)
    assert len(adapters.modules) == 7 * 3
    sizes = [sum(t.shape) * 4 for n, t in decoder.weights.tensors.items() if n in adapters.modules]
    assert adapters.entries == sum(sizes)


def test_the_trained_adapter_is_read_by_peft_and_has_our_log_probs(
    trained: tuple[Path, Learner, Adapters], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, learner, adapters = trained
    written = adapters.save(tmp_path / "adapter", str(folder))
    assert written == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"), tmp_path / "adapter"
    ).eval()
    rollouts = make_rollouts(7, 5)
    ours = learner.log_probs(rollouts)
    with adapters.off():
        base = learner.log_probs(rollouts)
    assert float((ours - base).abs().max()) > 0.1
    merged = model.merge_and_unload()
    for i, rollout in enumerate(rollouts):
        count = len(rollout.response_ids)
        theirs = slow_log_probs(merged, rollout).detach()
        torch.testing.assert_close(ours[i, :count], theirs, atol=2e-5, rtol=2e-5)


def test_two_steps_are_adamw_on_pefts_own_model(tiny_folder: Path, tmp_path: Path) -> None:
    """The same adapters through transformers' and peft's own forward and backward."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    source = make_model(make_config("llama"))
    folder = save_folder(source, tmp_path / "model", tiny_folder)
    learner, adapters = adapted(Decoder(make_config("llama"), weights_of(source)), lr=1e-3)
    adapters.save(tmp_path / "adapter", str(folder))
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"),
        tmp_path / "adapter",
        is_trainable=True,
    ).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == adapters.entries
    twin = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    for seed in (0, 1):
        rollouts = make_rollouts(7, seed)
        step = learner.step(rollouts, policy_gradient(ADVANTAGES))
        twin.zero_grad()
        total = sum(-slow_log_probs(model, r).sum() * a for r, a in zip(rollouts, ADVANTAGES, strict=True))
        (total / 7).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        twin.step()
        assert step.commit.norm == pytest.approx(float(norm), rel=1e-4)
        assert step.commit.adapted > 0 and not step.commit.changed
    rollouts = make_rollouts(7, 3)
    for i, row in enumerate(learner.log_probs(rollouts)):
        theirs = slow_log_probs(model, rollouts[i]).detach()
        torch.testing.assert_close(row[: len(theirs)], theirs, atol=1e-3, rtol=1e-3)


def test_the_patch_is_pefts_merge_bit_for_bit(tmp_path: Path, tiny_folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = make_config("qwen2")
    source = make_model(config, dtype=torch.bfloat16)
    folder = save_folder(source, tmp_path / "model", tiny_folder)
    learner, adapters = adapted(Decoder(config, weights_of(source)))
    train(learner)
    adapters.save(tmp_path / "adapter", str(folder))
    patch, lost = adapters.patch(folder, "m", {})
    assert 0 < lost < 0.2
    assert patch.entries == adapters.changed_counts(folder)[0] > 0
    patch.save(tmp_path / "patch.safetensors")
    checkpoint.apply(folder, tmp_path / "patch.safetensors", tmp_path / "ours")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16).state_dict()
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
        tmp_path / "adapter",
    )
    merged = model.merge_and_unload()
    theirs = merged.state_dict()
    differ = sum(int((bits_of(ours[k]) != bits_of(theirs[k])).sum()) for k in ours)
    assert differ <= 1e-4 * patch.entries  # the order of a sum of four products decides a tie

    # and any merged LoRA is a patch: `frugal-rl patch diff BASE MERGED`
    merged.save_pretrained(tmp_path / "merged")
    arguments = ["patch", "diff", str(folder), str(tmp_path / "merged"), "-o", str(tmp_path / "diff")]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    found = Patch.load(tmp_path / "diff")
    assert abs(found.entries - patch.entries) <= differ
    assert found.tensors.keys() == patch.tensors.keys()
    checkpoint.apply(folder, tmp_path / "diff", tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(bits_of(again[key]), bits_of(theirs[key])) for key in again)


def test_the_engine_samples_the_adapted_policy(trained: tuple[Path, Learner, Adapters]) -> None:
    """What it reports for its tokens is what the learner finds, and not the base's."""
    _, learner, adapters = trained
    engine = Engine(learner.decoder, 3, frozenset({5}), 100)
    requests = [Request((7, 8, 9 + i), (0, i)) for i in range(5)]
    rollouts = [r for _, r in sorted(engine.generate(requests, max_tokens=12, temperature=TEMPERATURE))]
    found = learner.log_probs(rollouts)
    with adapters.off():
        base = learner.log_probs(rollouts)
    for rollout, row, other in zip(rollouts, found, base, strict=True):
        sampled = torch.from_numpy(rollout.logprob_T)
        torch.testing.assert_close(row[: len(sampled)], sampled, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(other[: len(sampled)], sampled, atol=1e-2)


def test_the_reference_is_the_base_and_the_base_is_never_written(
    trained: tuple[Path, Learner, Adapters],
) -> None:
    folder, learner, _ = trained
    weights = learner.decoder.weights
    plain = Learner(Decoder(learner.decoder.config, Weights(weights.tensors)), 0.1, 1.0, TEMPERATURE, 100)
    rollouts = make_rollouts(4)
    assert torch.equal(learner.reference_log_probs(rollouts), plain.log_probs(rollouts))
    assert not torch.equal(learner.log_probs(rollouts), plain.log_probs(rollouts))
    assert weights.changed_counts() == (0, 0)
    own = checkpoint.Checkpoint(folder)
    assert all(
        torch.equal(torch.from_numpy(own.bits(k).copy()).view(torch.int32), bits_of(t))
        for k, t in weights.tensors.items()
    )


def test_adapters_learn_over_int8_weights_too() -> None:
    config = make_config("llama")
    source = make_model(config, dtype=torch.bfloat16)
    tensors = {k: Quantised.of(t) if t.ndim == 2 else t for k, t in weights_of(source).tensors.items()}
    learner, _ = adapted(Decoder(config, Weights(tensors)))
    rollouts = make_rollouts(7)
    losses = [learner.step(rollouts, policy_gradient(ADVANTAGES)).loss for _ in range(4)]
    assert losses[-1] < losses[0] - 0.5
    assert learner.decoder.weights.changed_counts() == (0, 0)


def test_a_step_that_is_not_finite_leaves_the_adapters(trained: tuple[Path, Learner, Adapters]) -> None:
    _, learner, adapters = trained
    before = [p.detach().clone() for p in adapters.parameters]
    for bad in (float("nan"), float("inf")):
        step = learner.step(make_rollouts(3), lambda x, bad=bad: (x.sum() * bad, {}))
        assert step.commit.dropped is not None
    step = learner.step(make_rollouts(3), lambda x: ((x - x.detach()).clamp(min=0).sqrt().sum(), {}))
    assert step.commit.dropped is not None and "norm" in step.commit.dropped
    assert all(torch.equal(a, b) for a, b in zip(before, adapters.parameters, strict=True))


def test_memory_that_runs_out_among_the_adapters_steps_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of them have moved: the step cannot be done again with smaller micro-batches."""
    learner, adapters = adapted(make_decoder("llama")[1])
    step, done = adapters.optimizer.step, []

    def short() -> None:
        if len(done) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.append(step())

    monkeypatch.setattr(adapters.optimizer, "step", short)
    with pytest.raises(FrugalError, match="cannot go on"):
        train(learner, 1)


def test_the_seed_decides_the_adapters_and_leaves_other_random_numbers_alone() -> None:
    made = []
    for seed in (1, 1, 2):
        _, decoder = make_decoder("qwen2")
        state = torch.random.get_rng_state()
        made.append(Adapters(decoder, optimizer("lora", 1e-3), 1.0, rank=2, seed=seed).parameters[0])
        assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_a_runs_merged_patch_is_for_the_checkpoint_and_scores_what_the_summary_says(
    form: str, tmp_path: Path, tiny_folder: Path
) -> None:
    changes = ["learner.kind=lora", "learner.lr=3e-3", "learner.rank=2", f"model.weights={form}"]
    recipe = load_recipe("tiny", [*SMALL, *changes])
    folder = tmp_path / "run"
    with open_session(recipe, QUIET, device=torch.device("cpu")) as session:
        journal = Journal.create(folder, recipe, force=False)
        summary = loop.train(session, journal, QUIET, lambda: False)
    assert journal.metrics[-1]["changed_step"] > 0
    assert journal.metrics[-1]["sampler_gap_max"] < 1e-3
    patch = Patch.load(folder / "patch.safetensors")
    assert checkpoint.verify(tiny_folder, patch).state == "base"
    assert patch.entries == summary["changed_any"] == journal.metrics[-1]["changed_any"]
    assert 0 < summary["merge_lost"] < 0.5
    assert summary["adapter_bytes"] == (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert len(summary["exported_correct"]) == 8
    with open_session(load_recipe("tiny", SMALL), QUIET, device=torch.device("cpu")) as session:
        session.policy.weights.write_patch_(patch)
        assert loop._heldout(session).correct == summary["exported_correct"]


def test_a_step_of_adapters_is_not_to_be_had_as_a_patch(tmp_path: Path) -> None:
    from frugal_rl.errors import InputError

    recipe = load_recipe("tiny", ["learner.kind=lora"])
    Journal.create(tmp_path / "run", recipe, force=False)
    arguments = ["patch", "at", str(tmp_path / "run"), "--step", "1", "-o", str(tmp_path / "p")]
    result = CliRunner().invoke(cli, arguments)
    assert isinstance(result.exception, InputError) and "adapter" in str(result.exception)
