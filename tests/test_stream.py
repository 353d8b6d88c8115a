"""Matrices that stay in the checkpoint: `host` weights and another model as the reference."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from frugal_rl import train as loop
from frugal_rl.checkpoint import Checkpoint
from frugal_rl.config import load_recipe, read_recipe
from frugal_rl.decoder import Decoder, parameter_names
from frugal_rl.errors import FrugalError, InputError
from frugal_rl.generate.engine import Engine
from frugal_rl.learn import Learner
from frugal_rl.patch import Patch
from frugal_rl.rollout import Request
from frugal_rl.session import open_session
from frugal_rl.storage import Quantised, Streamed, bits_of
from frugal_rl.stream import LayerStream, Source, _Buffer
from frugal_rl.weights import STORAGE, Weights

from .conftest import KINDS, make_config, make_model, make_rollouts, save_folder, weights_of

CPU = torch.device("cpu")
ADVANTAGES = torch.linspace(-1, 1, 9)


def loss(logprob_BT: Tensor) -> tuple[Tensor, dict[str, float]]:
    return -(logprob_BT.sum(1) * ADVANTAGES).mean(), {}


def make_folder(path: Path, tokenizer: Path, kind: str = "qwen2", **options: Any) -> Path:
    dtype, seed = options.pop("dtype", torch.bfloat16), options.pop("seed", 0)
    return save_folder(make_model(make_config(kind, **options), dtype=dtype, seed=seed), path, tokenizer)


def load(folder: Path, **options: bool) -> Decoder:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    names = parameter_names(config)
    return Decoder(config, Weights.from_checkpoint(folder, CPU, name="m", names=names, **options))


def host(folder: Path) -> Decoder:
    return load(folder, quantise=True, stream=True)


def step(decoder: Decoder, seed: int = 0, lr: float = 0.1) -> float:
    learner = Learner(decoder, lr, 1.0, 0.7, micro_tokens=60)
    return learner.step(make_rollouts(9, seed), loss).commit.norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_host_weights_learn_bit_for_bit_what_whole_weights_learn(
    kind: str, tied: bool, dtype: torch.dtype, tmp_path: Path, tiny_folder: Path
) -> None:
    folder = make_folder(tmp_path / "m", tiny_folder, kind, tied=tied, dtype=dtype)
    whole, streamed = load(folder), host(folder)
    for seed in range(3):
        assert step(whole, seed) == step(streamed, seed)
        with streamed.sampling():  # the layers' place is given up and taken again
            assert not streamed.weights._stream._buffers  # type: ignore[union-attr]
    for name, tensor in whole.weights.tensors.items():
        assert torch.equal(bits_of(tensor), bits_of(streamed.weights.tensors[name])), name
    assert whole.weights.patch({}).encode() == streamed.weights.patch({}).encode()
    assert whole.weights.changed_counts() == streamed.weights.changed_counts() > (1000, 0)
    matrices = {k for k, v in whole.weights.held.items() if len(v.shape) == 2}
    assert {k for k, v in streamed.weights.held.items() if isinstance(v, Streamed)} == matrices


def test_a_patch_is_laid_over_host_weights_as_over_whole_ones(tmp_path: Path, tiny_folder: Path) -> None:
    folder = make_folder(tmp_path / "m", tiny_folder)
    whole, streamed = load(folder), host(folder)
    step(whole)
    streamed.weights.write_patch_(Patch.decode(whole.weights.patch({}).encode(), "here"))
    assert step(whole, 1) == step(streamed, 1)
    assert whole.weights.patch({}).encode() == streamed.weights.patch({}).encode()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_sampler_reads_the_int8_twin_with_changed_entries_exact(
    dtype: torch.dtype, tmp_path: Path, tiny_folder: Path
) -> None:
    decoder = host(make_folder(tmp_path / "m", tiny_folder, tied=False, dtype=dtype))
    step(decoder, lr=0.02 if dtype == torch.bfloat16 else 1e-6)  # some entries change, not all
    weights, exact = decoder.weights, decoder.weights.tensors
    with decoder.sampling():
        for name, held in weights.held.items():
            seen = weights.load(name)
            if not isinstance(held, Streamed):
                assert torch.equal(seen, exact[name].float())
                continue
            code, absmax = Quantised.of(held.source.rows(np.arange(held.shape[0]))), held.sampled
            assert absmax is not None and torch.equal(code.absmax_O, absmax.absmax_O)
            expected = code.rows(slice(0, held.shape[0]), torch.float32).view(-1)
            if dtype == torch.float32:  # the twin's values are rounded to the checkpoint's own format
                expected = (code.code_OI * code.absmax_O[:, None] * (1 / 127)).view(-1)
            at_N = held.overlay.position_N
            assert 0 < len(at_N) < expected.numel()
            expected[at_N] = exact[name].view(-1)[at_N].float()
            torch.testing.assert_close(seen.view(-1), expected, rtol=1e-6, atol=0)
            assert torch.equal(seen.view(-1)[at_N], expected[at_N])
            assert torch.equal(weights.rows(name, 3, 9), seen[3:9])
    for name in weights.held:
        assert torch.equal(weights.load(name), exact[name].float())


def test_the_engine_samples_from_the_twin_and_the_learner_scores_the_checkpoint(
    tmp_path: Path, tiny_folder: Path
) -> None:
    folder = make_folder(tmp_path / "m", tiny_folder)
    decoder, whole = host(folder), load(folder)
    step(decoder)
    step(whole)
    requests = [Request((8, 9 + i % 3, 11), (0, i)) for i in range(7)]
    sampled = dict(Engine(decoder, 3, frozenset({5}), 30).generate(requests, max_tokens=12, temperature=1.0))
    rollouts = [sampled[i] for i in range(7)]
    with decoder.sampling():
        twin = Weights({k: decoder.weights.load(k).clone() for k in decoder.weights.held})
    for scorer, same in ((Decoder(decoder.config, twin), True), (decoder, False)):
        scored_BT = Learner(scorer, 0.1, 1.0, 1.0, 60).log_probs(rollouts)
        gap = max(
            float((torch.from_numpy(r.logprob_T) - scored_BT[i, : len(r.logprob_T)]).abs().max())
            for i, r in enumerate(rollouts)
        )
        assert (gap < 2e-5) == same
    assert torch.equal(scored_BT, Learner(whole, 0.1, 1.0, 1.0, 60).log_probs(rollouts))


def present(decoder: Decoder) -> set[str]:
    """The streamed matrices that are on the device."""
    held = decoder.weights.held.items()
    return {name for name, h in held if isinstance(h, Streamed) and h.present is not None}


def test_a_layer_on_the_device_never_outlives_a_change_of_the_weights(
    tmp_path: Path, tiny_folder: Path
) -> None:
    decoder = host(make_folder(tmp_path / "m", tiny_folder))
    name = decoder.targets[0][0].name
    decoder.weights.bring(0)
    before = decoder.weights.load(name).clone()
    with decoder.sampling():
        sampled = decoder.weights.load(name).clone()
    step(decoder)  # ends with layer 0 on the device
    decoder.weights.bring(0)
    assert present(decoder) == set(decoder.weights._groups[0])
    after = decoder.weights.load(name).clone()
    assert not torch.equal(before, after)
    with decoder.weights.base():
        decoder.weights.bring(0)
        assert torch.equal(decoder.weights.load(name), before)
        with decoder.sampling():  # the twin is the base's too
            assert torch.equal(decoder.weights.load(name), sampled)
    decoder.weights.bring(0)
    assert torch.equal(decoder.weights.load(name), after)
    decoder.weights.release()
    assert not present(decoder)


# --- the stream


def groups_of(folder: Path, layers: int) -> list[dict[str, Source]]:
    checkpoint = Checkpoint(folder)
    return [
        {
            name: Source(info, STORAGE[info.dtype])
            for name, info in checkpoint.tensors.items()
            if name.startswith(f"model.layers.{i}.") and len(info.shape) == 2
        }
        for i in range(layers)
    ]


def test_the_stream_brings_any_layer_in_any_order_and_leaves_the_present_one_alone(
    tmp_path: Path, tiny_folder: Path
) -> None:
    folder = make_folder(tmp_path / "m", tiny_folder, layers=5)
    checkpoint, groups = Checkpoint(folder), groups_of(folder, 5)
    stream = LayerStream(groups, CPU)
    rng = np.random.default_rng(0)
    for index in [0, 1, 2, 3, 4, 4, 3, 2, 1, 0, *rng.integers(0, 5, 60).tolist()]:
        arrived = stream.bring(index)
        assert set(arrived) == set(groups[index])
        if stream._ahead is not None:
            stream._ahead[1].result()  # the next one is there too
        for name, tensor in arrived.items():
            np.testing.assert_array_equal(bits_of(tensor).numpy().view("u2"), checkpoint.bits(name))
            tensor.zero_()  # it may be written to
    assert len(stream._buffers) == 2
    assert sum(b.bytes.nbytes for b in stream._buffers) == 2 * stream.buffer_bytes
    stream.release()
    assert not stream._buffers


def test_up_and_down_again_only_the_first_layer_is_waited_for(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "m", tiny_folder, layers=5)
    stream, waited, fill = LayerStream(groups_of(folder, 5), CPU), [], _Buffer.fill

    def counted(self: _Buffer, group: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            waited.append(next(iter(group)))
        fill(self, group)

    monkeypatch.setattr(_Buffer, "fill", counted)
    for index in [0, 1, 2, 3, 4, 3, 2, 1, 0]:  # the top layer stays where it is between the passes
        stream.bring(index)
    assert waited == [next(iter(stream.groups[0]))]


def test_a_checkpoint_that_is_cut_short_while_in_use_is_named(tmp_path: Path, tiny_folder: Path) -> None:
    folder = make_folder(tmp_path / "m", tiny_folder)
    decoder = host(folder)
    file = folder / "model.safetensors"
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    with pytest.raises(FrugalError, match=r"model\.safetensors: was cut short"):
        step(decoder)


# --- another model as the reference


def test_another_model_is_the_reference_and_leaves_nothing_on_the_device(
    tmp_path: Path, tiny_folder: Path
) -> None:
    policy = load(make_folder(tmp_path / "policy", tiny_folder))
    folder = make_folder(tmp_path / "reference", tiny_folder, "llama", layers=4, seed=3, tied=False)
    reference = load(folder, stream=True)
    learner = Learner(policy, 0.1, 1.0, 0.7, 60, reference=Learner(reference, 0.1, None, 0.7, 9999))
    rollouts = make_rollouts(9)
    scored_BT = learner.reference_log_probs(rollouts)
    assert torch.equal(scored_BT, Learner(load(folder), 0.1, 1.0, 0.7, 60).log_probs(rollouts))
    assert not torch.equal(scored_BT, learner.log_probs(rollouts))
    assert reference.weights._stream is not None and not reference.weights._stream._buffers
    assert not present(reference)
    # its matrices are nowhere but in the file: what is held are norms
    assert reference.weights.nbytes < 0.01 * weights_of(make_model(reference.config)).nbytes


def test_kl_pulls_towards_the_model_that_the_recipe_names(tmp_path: Path, tiny_folder: Path) -> None:
    from .test_train import QUIET, SMALL, groups_of, learn

    step_words = [*SMALL, "train.steps=2", "learner.lr=0.05"]
    with open_session(load_recipe("tiny", step_words), QUIET, device=CPU) as session:
        learn(session.learner, session.recipe, groups_of(session, lambda i: float(i % 2)))
        from frugal_rl import checkpoint

        patch = session.policy.weights.patch({})
        checkpoint.apply(tiny_folder, patch, tmp_path / "other")
    words = [*SMALL, "loss.kl=5", "loss.max_gap=9", f"model.reference={tmp_path / 'other'}"]
    with open_session(load_recipe("tiny", words), QUIET, device=CPU) as session:
        groups = groups_of(session, lambda i: float(i == 0))
        rollouts = [r for g in groups for r in g.rollouts]
        target_BT = session.learner.reference_log_probs(rollouts)

        def gap() -> float:
            return float((session.learner.log_probs(rollouts) - target_BT).square().mean())

        before, gaps = gap(), []
        for _ in range(4):
            done = learn(session.learner, session.recipe, groups)
            assert done is not None
            gaps.append(gap())
    assert gaps[-1] < before and done.stats["kl"] > 0


def test_a_reference_with_other_tokens_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    from .test_train import QUIET, SMALL

    folder = make_folder(tmp_path / "other", tiny_folder)
    recipe = load_recipe("tiny", [*SMALL, "loss.kl=1", f"model.reference={folder}"])
    with (
        pytest.raises(InputError, match="tokens"),
        open_session(recipe, QUIET, device=CPU),
    ):
        pass


def test_a_reference_that_nothing_asks_is_refused() -> None:
    recipe = load_recipe("tiny", [])
    text = recipe.to_toml().replace('reference = "base"', 'reference = "elsewhere"')
    with pytest.raises(InputError, match=r"reference .* kl = 0"):
        read_recipe(text)


# --- runs


def test_a_host_run_that_is_resumed_ends_as_one_never_stopped_and_fits_the_checkpoint(tmp_path: Path) -> None:
    from .test_train import SMALL, session_of, whole_and_halves

    recipe = load_recipe("tiny", [*SMALL, "model.weights=host"])
    patches, (_, summary), (_, learned) = whole_and_halves(recipe, tmp_path)
    assert patches[0] == patches[1]
    assert summary["accuracy_exported"]["problems"] == 8 and "export_lost" not in summary
    with session_of(load_recipe("tiny", SMALL)) as session:
        session.policy.weights.write_patch_(Patch.load(tmp_path / "whole" / "patch.safetensors"))
        for name, tensor in session.policy.weights.tensors.items():
            assert torch.equal(bits_of(tensor), bits_of(learned[name]))
        assert loop._heldout(session).score.value == summary["accuracy_exported"]["value"]
