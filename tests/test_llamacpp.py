"""llama.cpp as the sampler: its tensors are the policy's after every step, its samples those of its own."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from frugal_rl.cli import cli
from frugal_rl.config import load_recipe
from frugal_rl.decoder import Decoder, parameter_names
from frugal_rl.errors import FrugalError, InputError
from frugal_rl.generate import llama_library
from frugal_rl.generate.engine import Engine
from frugal_rl.generate.llama_library import Library
from frugal_rl.generate.llamacpp import LlamaEngine, Twin
from frugal_rl.generate.sample import StopText, Truncation
from frugal_rl.gguf.file import Gguf
from frugal_rl.gguf.write import convert
from frugal_rl.journal import Journal
from frugal_rl.learn import Learner
from frugal_rl.models import find_model, load_config
from frugal_rl.patch import Patch
from frugal_rl.rollout import Request, Rollout
from frugal_rl.session import Reporter, open_session
from frugal_rl.shortage import Surviving
from frugal_rl.storage import Changed
from frugal_rl.train import resume, train
from frugal_rl.weights import Weights

from .conftest import KINDS, VOCABULARY, make_config, make_model, needs_llama, weights_of

STOPS = frozenset({5, 7})
MAX_TOKENS = 24


def make_twin(kind: str = "qwen2", form: str = "f32", **changes: Any) -> tuple[Decoder, Twin]:
    """A random decoder and its copy in llama.cpp."""
    config = make_config(kind, intermediate_size=96, **changes)
    decoder = Decoder(config, weights_of(make_model(config)))
    return decoder, Twin(decoder.weights, config.to_dict(), form)


def make_engine(slots: int = 64, stops: frozenset[int] = STOPS, **parts: Any) -> LlamaEngine:
    decoder, twin = make_twin()
    return LlamaEngine(decoder, twin, slots, stops, **parts)


def make_requests(prompts: int, samples: int, longest: int = 9) -> list[Request]:
    rng = np.random.default_rng(3)
    texts = [tuple(rng.integers(8, VOCABULARY, 1 + n % longest).tolist()) for n in range(prompts)]
    return [Request(text, (0, i, g)) for i, text in enumerate(texts) for g in range(samples)]


def run(
    engine: Any, requests: list[Request], temperature: float = 1.0, max_tokens: int = MAX_TOKENS
) -> list[Rollout]:
    out = dict(engine.generate(requests, max_tokens=max_tokens, temperature=temperature))
    assert sorted(out) == list(range(len(requests)))
    return [out[i] for i in range(len(requests))]


def random_step(weights: Weights, seed: int, share: float = 0.02) -> dict[str, Changed]:
    """Some entries of every tensor, a little larger; what an optimizer step commits."""
    rng, changed = np.random.default_rng(seed), {}
    for name, held in weights.held.items():
        entries = int(np.prod(held.shape))
        position_N = np.sort(rng.choice(entries, max(1, int(share * entries)), replace=False))
        place_N = torch.from_numpy(position_N)
        before_N = held.at(place_N)
        after_N = before_N * 1.07 + 1e-3
        bits = {2: torch.int16, 4: torch.int32}[before_N.element_size()]
        changed[name] = Changed(place_N, before_N.view(bits), after_N.view(bits))
    return changed


# --- the weights


@needs_llama
@pytest.mark.parametrize("form", ["q8_0", "bf16", "f16", "f32"])
@pytest.mark.parametrize("kind", KINDS)
def test_after_steps_every_tensor_is_that_of_a_fresh_copy(kind: str, form: str) -> None:
    decoder, twin = make_twin(kind, form, tied=kind == "qwen3")
    before = twin.tensors()
    for seed in range(5):
        decoder.weights.write_(random_step(decoder.weights, seed))
        if seed % 2:  # several steps may come between two samplings
            assert twin.sync_() > 0
    assert twin.sync_() > 0 and twin.sync_() == 0
    config = decoder.config.to_dict()
    after, fresh = twin.tensors(), Twin(decoder.weights, config, form).tensors()
    assert set(after) == set(fresh)
    for name, blocks in fresh.items():
        assert np.array_equal(after[name], blocks), name
        assert not np.array_equal(after[name], before[name]), name


@needs_llama
def test_one_corrupted_block_is_seen() -> None:
    decoder, twin = make_twin(form="q8_0")
    decoder.weights.write_(random_step(decoder.weights, 0))
    twin.sync_()
    name = "blk.1.ffn_up.weight"
    block = twin.tensors()[name][5:6]
    block[0, 9] ^= 1
    twin.model.write_(name, np.asarray([5]), block)
    fresh = Twin(decoder.weights, decoder.config.to_dict(), "q8_0").tensors()
    assert [n for n, blocks in twin.tensors().items() if not np.array_equal(blocks, fresh[n])] == [name]


@needs_llama
@pytest.mark.parametrize("held", ["bf16", "int8", "host"])
def test_a_run_of_any_form_is_followed_and_its_gguf_is_that_of_the_policy(held: str, tmp_path: Path) -> None:
    config = make_config("llama", intermediate_size=96, tied=False)
    make_model(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "hf")
    files = find_model(str(tmp_path / "hf"))
    weights = Weights.from_checkpoint(
        files.folder,
        torch.device("cpu"),
        name="some",
        names=parameter_names(load_config(files)),
        quantise=held in ("int8", "host"),
        stream=held == "host",
    )
    twin = Twin(weights, files.config, "q8_0")
    if held != "int8":  # the policy is the checkpoint: the copy is the file that it converts to
        convert(files, tmp_path / "m.gguf", "q8_0", None)
        gguf = Gguf.read(tmp_path / "m.gguf")
        for name, blocks in twin.tensors().items():
            assert np.array_equal(blocks, gguf.blocks(gguf.tensors[name], "r")), name
    weights.write_(random_step(weights, 1))
    twin.sync_()
    fresh = Twin(weights, files.config, "q8_0").tensors()
    assert all(np.array_equal(blocks, fresh[name]) for name, blocks in twin.tensors().items())


@needs_llama
def test_other_devices_are_written_in_runs_or_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    _, twin = make_twin(form="q8_0")
    twin.model.on_gpu = True  # as if its tensors were not in host memory
    calls: list[int] = []
    original = twin.model.library.tensor_set
    library = replace(twin.model.library, tensor_set=lambda *a: (calls.append(a[3]), original(*a))[1])
    monkeypatch.setattr(twin.model, "library", library)
    monkeypatch.setattr(llama_library, "RUN_BYTES", 340)
    name = "blk.0.ffn_up.weight"
    blocks = twin.tensors()[name]
    few = np.asarray([0, 1, 2, 9])
    twin.model.write_(name, few, blocks[few] ^ 1)
    assert calls == [3 * 34, 34]
    many = np.arange(0, len(blocks), 2)
    twin.model.write_(name, many, blocks[many] ^ 3)
    assert calls[2:] == [len(blocks) * 34]
    expected = blocks.copy()
    expected[few] ^= 1
    expected[many] = blocks[many] ^ 3
    assert np.array_equal(twin.tensors()[name], expected)
    twin.model.on_gpu = False


# --- the samples


@needs_llama
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_the_learners(kind: str, temperature: float) -> None:
    decoder, twin = make_twin(kind)
    decoder.weights.write_(random_step(decoder.weights, 0))
    rollouts = run(LlamaEngine(decoder, twin, 8, STOPS), make_requests(12, 2), temperature)
    learned_BT = Learner(decoder, lr=1.0, clip=1.0, temperature=temperature, micro_tokens=500).log_probs(
        rollouts
    )
    for row, rollout in enumerate(rollouts):
        ours = learned_BT[row, : len(rollout.response_ids)].numpy()
        # the cache is float16: 1e-2 is four times the largest difference seen
        assert np.abs(rollout.policy_logprob_T - ours).max() < 1e-2
        assert np.array_equal(rollout.logprob_T, rollout.policy_logprob_T)


@needs_llama
def test_greedy_tokens_are_the_engines_wherever_they_are_clear() -> None:
    engine = make_engine(8)
    requests = make_requests(32, 1)
    ours = run(engine, requests, 0.0)
    theirs = run(Engine(engine.decoder, 64, STOPS, 1000), requests, 0.0)
    same = [np.array_equal(a.response_ids, b.response_ids) for a, b in zip(ours, theirs, strict=True)]
    assert sum(same) >= 30  # a float16 cache may turn a near tie


@needs_llama
def test_draws_at_a_temperature_are_the_engines_by_the_same_keys() -> None:
    engine = make_engine(8)
    requests = make_requests(12, 4)
    ours = run(engine, requests)
    theirs = run(Engine(engine.decoder, 64, STOPS, 1000), requests)
    same = [np.array_equal(a.response_ids, b.response_ids) for a, b in zip(ours, theirs, strict=True)]
    assert sum(same) >= 44  # of 48; other uniforms would leave none but the shortest


@needs_llama
@pytest.mark.parametrize("slots", [1, 3, 64])
def test_slot_count_and_order_of_requests_change_no_sample(slots: int) -> None:
    requests = make_requests(10, 3)
    expected = run(make_engine(7), requests)
    ours = run(make_engine(slots), requests[::-1])[::-1]
    for a, b in zip(expected, ours, strict=True):
        assert np.array_equal(a.response_ids, b.response_ids) and a.truncated == b.truncated
        assert np.abs(a.logprob_T - b.logprob_T).max() < 1e-2


@needs_llama
@pytest.mark.parametrize("slots", [1, 3, 5, 64])
def test_a_prompt_is_run_once_for_its_group_however_few_slots_there_are(slots: int) -> None:
    engine = make_engine(slots)
    requests = make_requests(9, 7)
    run(engine, requests)
    assert engine.stats.prompt_tokens == sum(len(p) for p in {r.prompt_ids for r in requests})


@needs_llama
def test_finished_streams_are_refilled_at_once() -> None:
    engine = make_engine(4)
    rollouts = run(engine, make_requests(8, 4))
    decoded = sum(len(r.response_ids) - 1 for r in rollouts)  # the first comes with the prompt
    assert len({len(r.response_ids) for r in rollouts}) > 3
    assert engine.stats.decode_steps < decoded / 4 + MAX_TOKENS
    assert engine.stats.decoded_tokens == decoded + len(rollouts)


@needs_llama
def test_a_prompt_longer_than_a_batch_gives_the_engines_log_probs(monkeypatch: pytest.MonkeyPatch) -> None:
    from frugal_rl.generate import llamacpp

    monkeypatch.setattr(llamacpp, "LLAMA_BATCH_TOKENS", 4)
    decoder, twin = make_twin()
    requests = make_requests(6, 2, longest=60)
    requests += [Request(tuple(range(8, 68)), (9, g)) for g in range(2)]
    rollouts = run(LlamaEngine(decoder, twin, 3, STOPS), requests)
    learned_BT = Learner(decoder, lr=1.0, clip=1.0, temperature=1.0, micro_tokens=500).log_probs(rollouts)
    for row, rollout in enumerate(rollouts):
        ours = learned_BT[row, : len(rollout.response_ids)].numpy()
        assert np.abs(rollout.policy_logprob_T - ours).max() < 1e-2


@needs_llama
def test_responses_of_one_token_need_no_decoding() -> None:
    engine = make_engine(3)
    rollouts = run(engine, make_requests(5, 2), max_tokens=1)
    assert engine.stats.decode_steps == 0 and {len(r.response_ids) for r in rollouts} == {1}
    assert all(r.truncated == (r.response_ids[-1] not in STOPS) for r in rollouts)


@needs_llama
def test_a_response_ends_in_a_stop_token_or_in_what_completes_a_stop_string() -> None:
    def decode(ids: Any) -> str:
        return "".join(chr(33 + i) for i in ids)

    text = StopText((decode([20]), decode([30, 31])), decode)
    rollouts = run(make_engine(6, stop_text=text), make_requests(20, 4))
    ended = [r for r in rollouts if not r.truncated]
    assert len({r.response_ids[-1] for r in ended}) == 3
    for rollout in rollouts:
        ids = rollout.response_ids.tolist()
        assert not ({5, 7, 20} & set(ids[:-1]))
        assert rollout.truncated == (ids[-1] not in (5, 7, 20)) and len(ids) <= MAX_TOKENS


@needs_llama
def test_truncated_draws_have_both_log_probs() -> None:
    out = dict(
        make_engine().generate(
            make_requests(4, 2), max_tokens=8, temperature=1.0, truncation=Truncation(top_k=3)
        )
    )
    for rollout in out.values():
        assert (rollout.logprob_T > rollout.policy_logprob_T).all()
        assert (rollout.logprob_T <= 0).all()


@needs_llama
def test_weights_changed_between_two_runs_are_seen() -> None:
    engine, requests = make_engine(), make_requests(4, 2)
    before = run(engine, requests)
    engine.decoder.weights.write_(random_step(engine.decoder.weights, 0, 0.5))
    after = run(engine, requests)
    assert any(not np.array_equal(a.response_ids, b.response_ids) for a, b in zip(before, after, strict=True))


@needs_llama
def test_logits_that_are_not_finite_are_an_error_and_not_a_token() -> None:
    engine = make_engine()
    norm = engine.decoder.weights.held["model.norm.weight"]
    bits = torch.full((1,), float("nan")).view(torch.int32)
    engine.decoder.weights.write_(
        {"model.norm.weight": Changed(torch.tensor([3]), norm.at(torch.tensor([3])).view(torch.int32), bits)}
    )
    with pytest.raises(FrugalError, match="not finite"):
        run(engine, make_requests(2, 1))


@needs_llama
def test_no_request_gives_no_rollout_and_leaving_early_leaves_it_usable() -> None:
    engine = make_engine(2)
    assert run(engine, []) == []
    stream = engine.generate(make_requests(6, 2), max_tokens=MAX_TOKENS, temperature=1.0)
    next(stream)
    stream.close()
    assert len(run(engine, make_requests(3, 2))) == 6


@needs_llama
def test_a_prompt_that_leaves_no_room_is_refused_with_what_would_do() -> None:
    with pytest.raises(InputError, match=r"max_tokens of at most 28"):
        run(make_engine(), [Request(tuple(range(100)), (0,))], max_tokens=29)


# --- the library


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(InputError, match=r"needs llama-cpp-python .*pip install 'frugal-rl\[llama\]'"):
        Library.load()


@needs_llama
def test_a_library_without_the_symbol_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_library, "GET_TENSOR", "_ZN_no_such")
    with pytest.raises(InputError, match=r"libllama\S* has no symbol _ZN_no_such, .*pip install"):
        Library.load()


@needs_llama
def test_a_file_that_llama_cpp_does_not_take_is_an_error_with_its_words(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(FrugalError, match=r"bad\.gguf: llama\.cpp does not load it: .*[a-z]"):
        llama_library.LlamaModel(Library.load(), tmp_path / "bad.gguf", threads=1, on_gpu=False)


@needs_llama
def test_a_tensor_that_is_not_there_is_named() -> None:
    _, twin = make_twin()
    with pytest.raises(FrugalError, match=r"no tensor blk\.9"):
        twin.model.tensor("blk.9.attn_q.weight")


@needs_llama
@pytest.mark.parametrize("when", ["cache", "batch"])
def test_without_memory_for_all_streams_fewer_sample_the_same(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A context that llama.cpp does not make, or a batch that it has no memory for (status -2)."""
    engine, requests = make_engine(slots=8), make_requests(3, 3)
    expected = run(engine, requests)
    llama, said = engine.twin.model.library.llama, []
    name = "llama_init_from_model" if when == "cache" else "llama_decode"
    real = getattr(llama, name)

    def short(first: Any, given: Any) -> Any:
        if when == "cache":
            return None if given.n_seq_max > 5 else real(first, given)
        return -2 if given.n_tokens > 4 and engine.stats.decode_steps else real(first, given)

    monkeypatch.setattr(llama, name, short)
    rollouts = run(Surviving(engine, torch.device("cpu"), said.append), requests)
    assert [r.response_ids.tolist() for r in rollouts] == [r.response_ids.tolist() for r in expected]
    assert engine.slots == 4 and len(said) == 1 and "in 4 slots" in said[0]
    monkeypatch.setattr(llama, name, lambda *_: None if when == "cache" else -1)
    with pytest.raises(FrugalError, match="one slot" if when == "cache" else "status -1"):
        run(Surviving(engine, torch.device("cpu"), said.append), requests)


@needs_llama
def test_on_a_gpu_its_cache_finds_the_memory_that_learning_has_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch keeps freed memory for itself, and llama.cpp asks CUDA."""
    engine, done = make_engine(), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("given back"))
    context = engine.twin.model.context
    monkeypatch.setattr(engine.twin.model, "context", lambda **k: done.append("context") or context(**k))
    run(engine, make_requests(1, 1))
    engine.decoder.device = torch.device("cuda")
    run(engine, make_requests(1, 1))
    assert done == ["context", "given back", "context"]


# --- training


SMALL = ["rollout.generator=llama.cpp", "rollout.prompts=4", "rollout.samples=4", "data.heldout=16"]


def silent(lines: list[str]) -> Reporter:
    return Reporter(lines.append, lambda row: None)


@needs_llama
def test_a_run_learns_from_it_corrected_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    recipe = load_recipe("tiny", [*SMALL, "train.steps=3"])
    lines: list[str] = []
    with open_session(recipe, silent(lines)) as session:
        journal = Journal.create(tmp_path / "a", recipe, force=False)
        summary = train(session, journal, silent(lines), lambda: False)
        twin = session.engine.sampler.twin  # type: ignore[attr-defined]
        twin.sync_()
        fresh = Twin(session.policy.weights, session.files.config, "q8_0").tensors()
        assert all(np.array_equal(blocks, fresh[name]) for name, blocks in twin.tensors().items())
    assert summary["steps"] == 3 and summary["changed_any"] > 1000
    assert summary["accuracy_exported"]["problems"] == 16
    # 8 bits: a gap, and far below that of other weights (correct.py)
    gaps = [row["sampler_gap"] for row in journal.metrics]
    assert all(1e-4 < gap < 2e-2 for gap in gaps)
    plan = session.plan  # the copy stays while the policy learns, the spare stream does not
    weights = int(plan.generating["llama.cpp's weights"])
    assert weights == plan.learning["llama.cpp's weights"] == pytest.approx(821_632 * 34 / 32, rel=0.01)
    assert "llama.cpp's spare stream" in set(plan.generating) - set(plan.learning)

    first = load_recipe("tiny", [*SMALL, "train.steps=2"])
    with open_session(first, silent(lines)) as session:
        train(session, Journal.create(tmp_path / "b", first, force=False), silent(lines), lambda: False)
    with open_session(recipe, silent(lines)) as session:
        journal, _ = Journal.open(tmp_path / "b")
        resume(session, journal, silent(lines))
        train(session, journal, silent(lines), lambda: False)
    steps = [Patch.load(tmp_path / run / "journal" / "00000003.safetensors") for run in ("a", "b")]
    assert steps[0].tensors == steps[1].tensors != {}


@needs_llama
def test_a_sampler_on_stale_weights_stops_the_run(tmp_path: Path) -> None:
    recipe = load_recipe("tiny", [*SMALL, "train.steps=12", "learner.lr=0.05"])
    with open_session(recipe, silent([])) as session:
        session.policy.weights.watchers.clear()
        journal = Journal.create(tmp_path / "a", recipe, force=False)
        with pytest.raises(FrugalError, match="the sampler is not the policy that learns"):
            train(session, journal, silent([]), lambda: False)


@needs_llama
def test_the_command_trains_with_it_and_a_patch_is_scored_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [word for key in (*SMALL[1:], "train.steps=1") for word in ("--set", key)]
    out = tmp_path / "run"
    trained = CliRunner().invoke(cli, ["train", "--generator", "llama.cpp", *small, "-o", str(out), "--json"])
    summary = json.loads(trained.stdout)
    assert 'generator = "llama.cpp"' in (out / "recipe.toml").read_text()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    scored = CliRunner().invoke(cli, ["eval", "--patch", summary["patch"], "--json"])
    assert json.loads(scored.stdout)["accuracy"] == summary["accuracy_exported"]
    refused = CliRunner().invoke(
        cli, ["eval", "--patch", summary["patch"], "--set", "rollout.generator=llama.cpp"]
    )
    assert isinstance(refused.exception, InputError) and "pip install" in str(refused.exception)
