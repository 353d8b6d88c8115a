"""The engine against transformers' own generate, one sequence at a time, token for token."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from frugal_rl.decoder import Decoder
from frugal_rl.errors import FrugalError, InputError
from frugal_rl.generate.cache import SlotCache
from frugal_rl.generate.engine import Engine, _Run, room_for
from frugal_rl.generate.eviction import Eviction
from frugal_rl.generate.sample import StopText, Truncation, draw, inverse_cdf, truncate
from frugal_rl.learn import Learner
from frugal_rl.rollout import Request, Rollout

from .conftest import KINDS, VOCABULARY, make_decoder, weights_of
from .frozen import AsItIs

STOPS = frozenset({5, 7})
MAX_TOKENS = 24


def make_requests(prompts: int, samples: int) -> list[Request]:
    """Ragged prompts; the first is a single token."""
    rng = np.random.default_rng(3)
    texts = [tuple(rng.integers(8, VOCABULARY, 1 + n % 9).tolist()) for n in range(prompts)]
    return [Request(text, (0, i, g)) for i, text in enumerate(texts) for g in range(samples)]


def run(engine: Engine, requests: list[Request], temperature: float) -> list[Rollout]:
    out = dict(engine.generate(requests, max_tokens=MAX_TOKENS, temperature=temperature))
    assert sorted(out) == list(range(len(requests)))
    return [out[i] for i in range(len(requests))]


def hugging_face(model: Any, prompt: tuple[int, ...], stops: frozenset[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        eos_token_id=sorted(stops),
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def frequent_tokens(decoder: Decoder, requests: list[Request]) -> frozenset[int]:
    """Three tokens that greedy responses often meet: as stop tokens they end many, at many lengths."""
    rollouts = run(Engine(decoder, 64, frozenset(), 1000), requests, 0.0)
    counts = Counter(int(t) for r in rollouts for t in set(r.response_ids[2:]))
    return frozenset(t for t, _ in counts.most_common(3))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers_generate(kind: str) -> None:
    model, decoder = make_decoder(kind)
    requests = make_requests(64, 1)
    stops = frequent_tokens(decoder, requests)
    expected = [hugging_face(model, r.prompt_ids, stops) for r in requests]
    assert len({len(ids) for ids in expected}) > 5
    for slots, ahead in ((64, 0), (5, 2), (1, 1)):
        engine = Engine(decoder, slots, stops, 30, ahead=ahead)
        for ids, rollout in zip(expected, run(engine, requests, 0.0), strict=True):
            assert rollout.response_ids.tolist() == ids, (slots, rollout)
            assert rollout.truncated == (ids[-1] not in stops)


def test_greedy_tokens_of_the_embedded_model_are_those_of_transformers_generate(tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    decoder = Decoder(model.config, weights_of(model))
    rng = np.random.default_rng(0)
    sums = ["+".join(map(str, rng.integers(0, 10, 2 + i % 7))) for i in range(64)]
    requests = [Request(tuple(tokenizer(f"Q:{text}=?")["input_ids"]), (i,)) for i, text in enumerate(sums)]
    stops = frozenset({tokenizer.eos_token_id})
    expected = [hugging_face(model, r.prompt_ids, stops) for r in requests]
    assert len({len(ids) for ids in expected}) > 5
    for slots in (64, 7):
        rollouts = run(Engine(decoder, slots, stops, 40), requests, 0.0)
        assert [r.response_ids.tolist() for r in rollouts] == expected


@pytest.mark.parametrize("slots", [1, 4, 7])
def test_slot_count_and_order_of_requests_change_no_sample(slots: int) -> None:
    _, decoder = make_decoder("qwen2")
    requests = make_requests(8, 3)
    expected = run(Engine(decoder, 24, STOPS, 1000), requests, 1.0)
    order = np.random.default_rng(1).permutation(len(requests)).tolist()
    shuffled = run(Engine(decoder, slots, STOPS, 20), [requests[i] for i in order], 1.0)
    for i, rollout in zip(order, shuffled, strict=True):
        assert rollout.response_ids.tolist() == expected[i].response_ids.tolist()


def test_samples_of_a_group_differ_and_keys_decide_them() -> None:
    _, decoder = make_decoder("llama")
    engine = Engine(decoder, 8, STOPS, 100)
    prompt = (9, 10, 11)
    texts = [tuple(r.response_ids) for r in run(engine, [Request(prompt, (0, i)) for i in range(8)], 1.0)]
    assert len(set(texts)) == 8
    again = [tuple(r.response_ids) for r in run(engine, [Request(prompt, (1, i)) for i in range(8)], 1.0)]
    assert not set(texts) & set(again)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_the_learners(kind: str, temperature: float) -> None:
    _, decoder = make_decoder(kind, tied=False)
    rollouts = run(Engine(decoder, 6, STOPS, 40), make_requests(8, 2), temperature)
    logprob_BT = Learner(decoder, 0.1, 1.0, temperature, 100).log_probs(rollouts)
    for i, rollout in enumerate(rollouts):
        own_T = torch.from_numpy(rollout.logprob_T)
        # float32, other order of sums
        torch.testing.assert_close(logprob_BT[i, : len(own_T)], own_T, atol=1e-5, rtol=1e-5)


def test_in_bf16_arithmetic_log_probs_agree_within_3e_2() -> None:
    _, decoder = make_decoder("qwen2", dtype=torch.bfloat16)
    from frugal_rl.weights import Weights

    low = Decoder(decoder.config, Weights(decoder.weights.tensors, compute_dtype=torch.bfloat16))
    rollouts = run(Engine(low, 6, STOPS, 40), make_requests(8, 2), 1.0)
    logprob_BT = Learner(low, 0.1, 1.0, 1.0, 100).log_probs(rollouts)
    gaps = [
        float((logprob_BT[i, : len(r.logprob_T)] - torch.from_numpy(r.logprob_T)).abs().max())
        for i, r in enumerate(rollouts)
    ]
    assert np.median(gaps) < 3e-2
    assert max(gaps) < 0.2


def test_a_group_runs_its_prompt_once_when_it_fits() -> None:
    _, decoder = make_decoder("qwen2")
    engine = Engine(decoder, 24, STOPS, 1000)
    requests = make_requests(4, 6)
    run(engine, requests, 1.0)
    assert engine.stats.prompt_tokens == sum(len(r.prompt_ids) for r in requests[::6])


@pytest.mark.parametrize("prompt,evictions", [(11, 0), (12, 0), (13, 1)])
def test_a_group_of_any_size_runs_its_prompt_once_until_its_entries_are_evicted(
    prompt: int, evictions: int
) -> None:
    """One slot, three samples: the later ones begin from the entries that the first began from."""
    _, decoder = make_decoder("qwen2")
    requests = [Request(tuple(range(8, 8 + prompt)), (0, i)) for i in range(3)]
    engine = Engine(decoder, 1, frozenset(), 1000, eviction=Eviction("streaming", 12, MAX_TOKENS))
    run(engine, requests, 1.0)
    assert (engine.stats.prompt_tokens, engine.stats.evictions) == (prompt, evictions)
    assert engine.stats.decoded_tokens == 3 * MAX_TOKENS
    engine = Engine(decoder, 1, frozenset(), 1000, eviction=Eviction("streaming", 12, 4))
    run(engine, requests, 1.0)
    assert engine.stats.prompt_tokens == 3 * prompt


def test_finished_slots_are_refilled_at_once() -> None:
    _, decoder = make_decoder("qwen2")
    engine = Engine(decoder, 4, STOPS, 1000)
    rollouts = run(engine, make_requests(16, 2), 1.0)
    lengths = [len(r.response_ids) for r in rollouts]
    assert min(lengths) < max(lengths)
    # perfect packing needs total / slots steps; the tail and the first token (from the prefill) aside
    assert engine.stats.decode_steps <= sum(lengths) / 4 + max(lengths)


def test_idle_slots_and_columns_beyond_the_longest_slot_change_no_token() -> None:
    _, decoder = make_decoder("qwen2")
    requests = make_requests(8, 2)
    exact = run(Engine(decoder, 7, STOPS, 1000), requests, 1.0)
    few_shapes = Engine(decoder, 7, STOPS, 1000, recorder=lambda _: AsItIs())
    for one, other in zip(exact, run(few_shapes, requests, 1.0), strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        np.testing.assert_allclose(one.logprob_T, other.logprob_T, atol=1e-5)


class Operations(TorchDispatchMode):
    """Records what torch is asked to do, and the shapes that come out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        parts = out if isinstance(out, tuple | list) else [out]
        masks = args[1] if "index" in str(func) and isinstance(args[1], list | tuple) else []
        if any(isinstance(m, torch.Tensor) and m.dtype == torch.bool for m in masks):
            self.seen.append(("nonzero of a mask", []))
        self.seen.append((str(func), [tuple(t.shape) for t in parts if isinstance(t, torch.Tensor)]))
        return out


WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "is_nonzero")


@pytest.mark.parametrize("method", [None, "rkv", "snapkv", "h2o", "streaming"])
@pytest.mark.parametrize("truncation", [Truncation(), Truncation(9, 0.9, 0.05)])
def test_decoding_waits_for_no_value_and_has_static_shapes(method: Any, truncation: Truncation) -> None:
    _, decoder = make_decoder("qwen2")
    eviction = Eviction(method, 12, 4) if method else None
    engine = Engine(decoder, 4, STOPS, 1000, eviction=eviction)
    with torch.no_grad(), decoder.sampling():
        batch = _Run(engine, make_requests(4, 1), MAX_TOKENS, 1.0, truncation)
        batch.admit()
        steps = []
        for _ in range(14):
            with Operations() as operations:
                batch.decode()
            steps.append(operations.seen)
            assert not [name for name, _ in operations.seen if any(w in name for w in WAITS)]
        assert engine.stats.evictions > (0 if method else -1)
        # the same slots and columns: the same operations on the same shapes, whatever the values
        batch.entry_S.fill_(3)
        with Operations() as first:
            batch._step(4, 12)
        batch.token_ST.random_(8, VOCABULARY)
        batch.entry_S[1] = 7
        with Operations() as second:
            batch._step(4, 12)
    assert first.seen == second.seen
    with Operations() as waiting:  # and the names are those of what does wait
        bool(batch.token_ST[0, 0] > 0)
    assert any("_local_scalar_dense" in name for name, _ in waiting.seen)


def test_what_would_fit_is_said_where_something_would() -> None:
    assert room_for(9, 4, 10) == "max_tokens of at most 1 or prompts of at most 6 tokens would do"
    assert room_for(10, 9, 10) == "prompts of at most 1 tokens would do"
    assert room_for(9, 10, 10) == "max_tokens of at most 1 would do"


def test_the_cache_is_as_large_as_its_slots_say() -> None:
    _, decoder = make_decoder("qwen2")
    engine = Engine(decoder, 4, STOPS, 1000)
    requests = make_requests(9, 1)
    run(engine, requests, 0.0)
    entries = max(len(r.prompt_ids) for r in requests) + MAX_TOKENS
    assert engine.stats.cache_bytes == 2 * 3 * 4 * 2 * entries * 16 * 4


def test_no_request_gives_no_rollout() -> None:
    _, decoder = make_decoder("qwen2")
    assert run(Engine(decoder, 4, STOPS, 1000), [], 1.0) == []


def test_leaving_the_iterator_early_leaves_the_decoder_usable() -> None:
    _, decoder = make_decoder("qwen2")
    engine = Engine(decoder, 4, STOPS, 1000)
    stream = engine.generate(make_requests(9, 1), max_tokens=MAX_TOKENS, temperature=1.0)
    next(stream)
    stream.close()
    run(engine, make_requests(2, 1), 1.0)


def test_weights_changed_between_two_runs_are_seen() -> None:
    _, decoder = make_decoder("qwen2", dtype=torch.bfloat16)  # computed in float32: layers are copied
    engine, requests = Engine(decoder, 4, STOPS, 1000), make_requests(4, 1)
    before = run(engine, requests, 0.0)
    for name, tensor in decoder.weights.tensors.items():
        if "proj.weight" in name:
            tensor.mul_(-1.0)
    after = run(engine, requests, 0.0)
    assert [r.response_ids.tolist() for r in before] != [r.response_ids.tolist() for r in after]


def test_logits_that_are_not_finite_are_an_error_and_not_a_token() -> None:
    _, decoder = make_decoder("qwen2")
    decoder.weights.tensors[decoder.norm_name][0] = float("inf")
    with pytest.raises(FrugalError, match="not finite"):
        run(Engine(decoder, 4, STOPS, 1000), make_requests(4, 1), 1.0)


@pytest.mark.parametrize("ahead", [1, 2, 7, 100])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_how_late_ends_are_seen_changes_nothing(ahead: int, temperature: float) -> None:
    _, decoder = make_decoder("qwen2")
    requests = make_requests(9, 2)
    stops = STOPS if temperature else frequent_tokens(decoder, requests)
    for slots in (18, 5):
        at_once, late = (
            run(Engine(decoder, slots, stops, 100, ahead=n), requests, temperature) for n in (0, ahead)
        )
        assert len({len(r.response_ids) for r in at_once}) > (3 if temperature else 1)
        for one, other in zip(at_once, late, strict=True):
            assert one.response_ids.tolist() == other.response_ids.tolist()
            assert one.truncated == other.truncated
            np.testing.assert_allclose(one.logprob_T, other.logprob_T, atol=1e-5)


@pytest.mark.parametrize("ahead", [0, 1])
def test_slots_are_busy_nine_tenths_of_the_time_until_the_queue_is_empty(ahead: int) -> None:
    """With ragged lengths: a stop token in 1 of about 40 tokens, 80 at most."""
    _, decoder = make_decoder("llama", layers=1)
    engine = Engine(decoder, 8, frozenset({5, 7}), 1000, ahead=ahead)
    requests = [Request((9 + n,), (n, g)) for n in range(16) for g in range(4)]
    out = [r for _, r in engine.generate(requests, max_tokens=80, temperature=1.0)]
    lengths = [len(r.response_ids) for r in out]
    assert np.std(lengths) > 10
    stats = engine.stats
    assert stats.queue_tokens >= 0.9 * 8 * stats.queue_steps
    # all tokens but those of prompts and of the tail: a count that is wrong would not know them
    assert sum(lengths) - 64 - 8 * 80 <= stats.queue_tokens <= sum(lengths) - 64
    assert stats.queue_tokens <= 8 * stats.queue_steps
    # an idle slot has ended unseen: for `ahead` steps, and one more where the first token was the end
    assert 8 * stats.queue_steps - stats.queue_tokens <= ahead * 64 + lengths.count(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_a_prompt_in_chunks_gives_the_tokens_of_the_whole(kind: str, chunk: int) -> None:
    _, decoder = make_decoder(kind)
    requests = make_requests(9, 2)
    whole = run(Engine(decoder, 5, STOPS, 1000), requests, 1.0)
    chunked = run(Engine(decoder, 5, STOPS, chunk), requests, 1.0)
    for one, other in zip(whole, chunked, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        np.testing.assert_allclose(one.logprob_T, other.logprob_T, atol=1e-5)  # order of sums


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunks_without_a_mask_give_the_tokens_of_the_whole(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where there is flash attention; here PyTorch makes a mask of it."""
    _, decoder = make_decoder("qwen2")
    requests = make_requests(9, 2)
    whole = run(Engine(decoder, 5, STOPS, 1000), requests, 1.0)
    asked: list[tuple[int, int]] = []

    def fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
        asked.append((query.shape[2], key.shape[2]))
        return True

    monkeypatch.setattr("frugal_rl.decoder._flash_fits", fits)
    chunked = run(Engine(decoder, 5, STOPS, chunk), requests, 1.0)
    assert any(queries < entries for queries, entries in asked)
    for one, other in zip(whole, chunked, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        np.testing.assert_allclose(one.logprob_T, other.logprob_T, atol=1e-5)  # order of sums


@pytest.mark.parametrize("slots", [1, 2, 5, 7])
def test_a_prompt_is_run_once_for_its_group_however_few_slots_there_are(slots: int) -> None:
    _, decoder = make_decoder("qwen2")
    engine, requests = Engine(decoder, slots, STOPS, 1000), make_requests(4, 6)
    expected = run(Engine(decoder, 24, STOPS, 1000), requests, 1.0)
    rollouts = run(engine, requests, 1.0)
    assert engine.stats.prompt_tokens == sum(len(r.prompt_ids) for r in requests[::6])
    for one, other in zip(expected, rollouts, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        np.testing.assert_allclose(one.logprob_T, other.logprob_T, atol=1e-5)


def test_the_longest_prompts_are_run_first() -> None:
    _, decoder = make_decoder("qwen2")
    requests = make_requests(9, 1)
    stream = Engine(decoder, 1, STOPS, 1000).generate(requests, max_tokens=3, temperature=1.0)
    lengths = [len(rollout.prompt_ids) for _, rollout in stream]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) == 9


def test_responses_of_one_token_need_no_decoding() -> None:
    _, decoder = make_decoder("qwen2")
    engine = Engine(decoder, 2, STOPS, 1000)
    stream = engine.generate(make_requests(5, 1), max_tokens=1, temperature=1.0)
    assert [len(rollout.response_ids) for _, rollout in stream] == [1] * 5
    assert engine.stats.decode_steps == 0


def test_a_prompt_that_leaves_no_room_is_refused_with_what_would_do() -> None:
    _, decoder = make_decoder("qwen2")  # 128 positions
    request = Request(tuple(range(8, 58)), (0,))
    engine = Engine(decoder, 1, STOPS, 1000)
    with pytest.raises(InputError, match="max_tokens of at most 78 or prompts of at most 49 tokens"):
        next(engine.generate([request], max_tokens=79, temperature=1.0))
    next(engine.generate([request], max_tokens=78, temperature=1.0))


# --- truncation and stop strings


@pytest.mark.parametrize(
    "truncation",
    [Truncation(top_k=3), Truncation(top_p=0.3), Truncation(min_p=0.4), Truncation(9, 0.7, 0.05)],
)
def test_both_log_probs_are_those_of_their_distributions(truncation: Truncation) -> None:
    model, decoder = make_decoder("qwen2")
    learner = Learner(decoder, 0.1, 1.0, 0.7, 100)
    out = dict(
        Engine(decoder, 6, STOPS, 40).generate(
            make_requests(8, 2), max_tokens=MAX_TOKENS, temperature=0.7, truncation=truncation
        )
    )
    rollouts = [out[i] for i in range(16)]
    logprob_BT = learner.log_probs(rollouts)
    larger = 0
    for i, rollout in enumerate(rollouts):
        own_T = torch.from_numpy(rollout.policy_logprob_T)
        torch.testing.assert_close(logprob_BT[i, : len(own_T)], own_T, atol=1e-5, rtol=1e-5)
        assert (rollout.logprob_T >= rollout.policy_logprob_T - 1e-6).all()
        larger += int((rollout.logprob_T > rollout.policy_logprob_T + 0.1).sum())
        ids = [*rollout.prompt_ids, *rollout.response_ids.tolist()]
        with torch.no_grad():
            logit_TV = model(torch.tensor([ids[:-1]])).logits[0, len(rollout.prompt_ids) - 1 :]
        drawn_TV = truncate(torch.log_softmax(logit_TV / 0.7, dim=-1), truncation).log_softmax(dim=-1)
        exact_T = drawn_TV.gather(1, torch.tensor(ids[len(rollout.prompt_ids) :])[:, None])[:, 0]
        np.testing.assert_allclose(rollout.logprob_T, exact_T.numpy(), atol=1e-5)
    assert larger > 20


def test_without_truncation_the_two_log_probs_are_equal() -> None:
    _, decoder = make_decoder("qwen2")
    for temperature in (0.0, 0.7):
        for rollout in run(Engine(decoder, 6, STOPS, 40), make_requests(4, 1), temperature):
            assert np.array_equal(rollout.logprob_T, rollout.policy_logprob_T)


def letters(ids: Sequence[int]) -> str:
    """Every token is one letter or two."""
    return "".join(chr(97 + i % 5) * (1 + i % 2) for i in ids)


@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("slots", [3, 18])
@pytest.mark.parametrize("strings", [("da",), ("cc", "eba"), ("bb", "dddd")])
def test_a_response_ends_in_the_token_that_completes_a_stop_string(
    strings: tuple[str, ...], slots: int, ahead: int
) -> None:
    _, decoder = make_decoder("qwen2")
    requests = make_requests(9, 2)
    whole = run(Engine(decoder, 18, STOPS, 100), requests, 1.0)
    stop = StopText(strings, letters)
    cut = run(Engine(decoder, slots, STOPS, 100, stop_text=stop, ahead=ahead), requests, 1.0)
    shortened = 0
    for one, other in zip(whole, cut, strict=True):
        ids = one.response_ids.tolist()
        ends = [n for n in range(1, len(ids) + 1) if any(s in letters(ids[:n]) for s in strings)]
        assert other.response_ids.tolist() == (ids[: ends[0]] if ends else ids)
        assert len(other.logprob_T) == len(other.policy_logprob_T) == len(other.response_ids)
        assert other.truncated == (one.truncated and not ends)
        shortened += bool(ends) and ends[0] < len(ids)
    assert shortened >= 3


def test_little_is_decoded_beyond_a_stop_string() -> None:
    """Nothing, but a step for one that the first token completes, which comes from the prompt."""
    _, decoder = make_decoder("qwen2")
    ends = set()
    for request in make_requests(9, 2):
        engine = Engine(decoder, 1, STOPS, 100, stop_text=StopText(("da", "bb"), letters))
        length = len(run(engine, [request], 1.0)[0].response_ids)
        assert engine.stats.decode_steps == max(1, length - 1)
        ends.add(length)
    assert min(ends) < max(ends) == MAX_TOKENS


def test_a_stop_string_is_found_across_looks_and_only_the_first_one_counts() -> None:
    stop = StopText(("abc",), lambda ids: "".join(map(chr, ids)))
    ids = [ord(c) for c in "xabxabcabc"]
    assert stop.end(ids, 0) == 7
    assert stop.end(ids[:6], 0) is None
    assert stop.end(ids, 6) == 7


def test_a_character_in_several_tokens_completes_a_stop_string_with_its_last() -> None:
    tokens = [bytes([b]) for b in "né→!".encode()]
    stop = StopText(("→",), lambda ids: b"".join(tokens[i] for i in ids).decode(errors="replace"))
    assert stop.end(range(len(tokens)), 0) == 6


@pytest.mark.parametrize("k,p,m", [(5, None, None), (None, 0.6, None), (None, None, 0.2), (40, 0.8, 0.1)])
def test_truncation_keeps_what_transformers_warpers_keep(
    k: int | None, p: float | None, m: float | None
) -> None:
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logprob_SV = torch.log_softmax(torch.randn(50, VOCABULARY) * 2, dim=-1)
    expected_SV = logprob_SV.clone()
    for kind, value in ((TopKLogitsWarper, k), (TopPLogitsWarper, p), (MinPLogitsWarper, m)):
        if value is not None:
            expected_SV = kind(value)(None, expected_SV)
    kept_SV = truncate(logprob_SV, Truncation(k, p, m))
    assert torch.equal(kept_SV, expected_SV)
    assert int(kept_SV.isinf().sum()) > 50


def test_truncation_equals_its_slow_twin_with_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        # eighths: sums are exact, and ties are many
        probability_V = rng.multinomial(8, np.full(6, 1 / 6)) / 8
        k, p, m = int(rng.integers(1, 7)), rng.integers(1, 9) / 8, rng.integers(1, 9) / 8
        kept = set(range(6))
        kth = sorted(probability_V, reverse=True)[k - 1]
        kept = {v for v in kept if probability_V[v] >= kth}
        total, counted, nucleus = sum(probability_V[v] for v in kept), 0.0, set()
        for v in sorted(kept, key=lambda v: (-probability_V[v], v)):
            if counted < p * total - 1e-6 or not nucleus:
                nucleus.add(v)
            counted += probability_V[v]
        kept = {v for v in nucleus if probability_V[v] > 0 and probability_V[v] >= m * max(probability_V)}
        with np.errstate(divide="ignore"):
            logprob_SV = torch.from_numpy(np.log(probability_V))[None]
        got_V = truncate(logprob_SV, Truncation(k, p - 1e-6, m - 1e-6))[0]
        assert {int(v) for v in torch.nonzero(got_V > float("-inf"))} == kept


def test_drawing_by_blocks_is_drawing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logit_SV, uniform_S = torch.randn(20, 30), torch.rand(20)
    whole = draw(logit_SV, uniform_S, 0.8, Truncation(top_k=9))
    monkeypatch.setattr("frugal_rl.generate.sample.TRUNCATION_BLOCK_BYTES", 3 * 30 * 4)
    for one, other in zip(whole, draw(logit_SV, uniform_S, 0.8, Truncation(top_k=9)), strict=True):
        assert torch.equal(one, other)


def test_drawing_follows_the_distribution() -> None:
    probability_V = torch.tensor([0.5, 0.0, 0.125, 0.25, 0.125, 0.0])
    uniform_S = (torch.arange(4096) + 0.5) / 4096
    token_S = inverse_cdf(probability_V.log().expand(4096, -1), uniform_S)
    assert torch.bincount(token_S, minlength=6).tolist() == [2048, 0, 512, 1024, 512, 0]


def test_the_largest_uniform_draws_a_token_that_can_be_drawn() -> None:
    logprob_SV = torch.log_softmax(torch.randn(2000, 300), dim=-1)
    logprob_SV[:, 200:] = float("-inf")
    token_S = inverse_cdf(logprob_SV, torch.full((2000,), 1 - 2.0**-24))
    assert int(token_S.max()) < 200


def test_one_row_alone_is_added_up_in_float64_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There float32 sums of one row fall by an ulp here and there, and rise where the probability is 0."""
    logprob_SV = torch.log_softmax(3 * torch.randn(2, 5000), dim=-1)
    uniform_S = torch.tensor([0.3, 0.7])
    expected_S = inverse_cdf(logprob_SV, uniform_S)
    dtypes = []
    add = torch.Tensor.cumsum_
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.Tensor, "cumsum_", lambda x, dim: dtypes.append(x.dtype) or add(x, dim))
    for rows in (slice(0, 2), slice(0, 1), slice(1, 2)):
        assert inverse_cdf(logprob_SV[rows], uniform_S[rows]).tolist() == expected_S[rows].tolist()
        truncate(logprob_SV[rows], Truncation(None, 0.9))
    assert dtypes == [torch.float32] * 2 + [torch.float64] * 4


def test_copying_a_slot_copies_its_prompt_only() -> None:
    cache = SlotCache(
        layers=2, slots=3, kv_heads=2, entries=5, head_size=4, dtype=torch.float32, device=torch.device("cpu")
    )
    cache.key_LSKCD.normal_()
    before = cache.key_LSKCD.clone()
    cache.copy_(0, [2], 3)
    assert torch.equal(cache.key_LSKCD[:, 2, :, :3], before[:, 0, :, :3])
    assert torch.equal(cache.key_LSKCD[:, 2, :, 3:], before[:, 2, :, 3:])
    assert torch.equal(cache.key_LSKCD[:, :2], before[:, :2])


@pytest.mark.parametrize("method", [None, "h2o"])
def test_the_cache_is_gone_when_generating_ends_without_the_garbage_collector(
    method: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learner's memory and the KV pool's are the same bytes in turn."""
    _, decoder = make_decoder("qwen2")
    eviction = Eviction(method, 24, 8) if method else None  # type: ignore[arg-type]
    pools: list[weakref.ref[Any]] = []
    made = SlotCache.__init__

    def noted(self: Any, **given: Any) -> None:
        made(self, **given)
        pools.append(weakref.ref(self.key_LSKCD))

    monkeypatch.setattr(SlotCache, "__init__", noted)
    engine = Engine(decoder, 2, STOPS, 64, eviction=eviction)
    requests = make_requests(5, 2)
    gc.collect()
    gc.disable()
    try:
        run(engine, requests, 1.0)
        assert [pool() for pool in pools] == [None]
        stopped = engine.generate(requests, max_tokens=MAX_TOKENS, temperature=1.0)
        next(stopped)
        del stopped
        assert [pool() for pool in pools] == [None, None]
    finally:
        gc.enable()
