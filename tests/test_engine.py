"""The engine against transformers' own generate, one sequence at a time, token for token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from frugal_rl.errors import FrugalError
from frugal_rl.generate.cache import SlotCache
from frugal_rl.generate.engine import Engine, _inverse_cdf
from frugal_rl.learn import Learner
from frugal_rl.rollout import Request, Rollout

from .conftest import KINDS, VOCABULARY, make_decoder

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


def hugging_face(model: Any, prompt: tuple[int, ...]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        eos_token_id=sorted(STOPS),
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers_generate(kind: str) -> None:
    model, decoder = make_decoder(kind)
    requests = make_requests(16, 1)
    for slots in (16, 5, 1):
        rollouts = run(Engine(decoder, slots, STOPS, 30), requests, 0.0)
        for request, rollout in zip(requests, rollouts, strict=True):
            expected = hugging_face(model, request.prompt_ids)
            assert rollout.response_ids.tolist() == expected, (slots, request)
            assert rollout.truncated == (expected[-1] not in STOPS)


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
    from frugal_rl.decoder import Decoder
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


def test_finished_slots_are_refilled_at_once() -> None:
    _, decoder = make_decoder("qwen2")
    engine = Engine(decoder, 4, STOPS, 1000)
    rollouts = run(engine, make_requests(16, 2), 1.0)
    lengths = [len(r.response_ids) for r in rollouts]
    assert min(lengths) < max(lengths)
    # perfect packing needs total / slots steps; the tail and the first token (from the prefill) aside
    assert engine.stats.decode_steps <= sum(lengths) / 4 + max(lengths)


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


def test_drawing_follows_the_distribution() -> None:
    probability_V = torch.tensor([0.5, 0.0, 0.125, 0.25, 0.125, 0.0])
    uniform_S = (torch.arange(4096) + 0.5) / 4096
    token_S = _inverse_cdf(probability_V.log().expand(4096, -1), uniform_S)
    assert torch.bincount(token_S, minlength=6).tolist() == [2048, 0, 512, 1024, 512, 0]


def test_the_largest_uniform_draws_a_token_that_can_be_drawn() -> None:
    logprob_SV = torch.log_softmax(torch.randn(2000, 300), dim=-1)
    logprob_SV[:, 200:] = float("-inf")
    token_S = _inverse_cdf(logprob_SV, torch.full((2000,), 1 - 2.0**-24))
    assert int(token_S.max()) < 200


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
