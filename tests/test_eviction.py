"""Eviction: every score against its formula in plain loops, and the engine under a fixed count of entries."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from frugal_rl.config import LEAST_KV_BUDGET
from frugal_rl.decoder import Decoder
from frugal_rl.errors import InputError
from frugal_rl.generate import eviction as module
from frugal_rl.generate.cache import SlotCache
from frugal_rl.generate.engine import Engine
from frugal_rl.generate.eviction import (
    METHODS,
    SINKS,
    WINDOW,
    AttentionSums,
    Eviction,
    Held,
    LastQueries,
    kept_entries,
)
from frugal_rl.memory import EVICTION_BYTES, WINDOW_QUERIES, Shape, Work, lay_out
from frugal_rl.rollout import Request, Rollout

from .conftest import KINDS, VOCABULARY, make_config, make_decoder, make_model, weights_of

STOPS = frozenset({5, 7})
LENGTHS = [30, 17, 23]  # of slots side by side
ENTRIES, BUDGET, KV_HEADS, SIZE = 30, 14, 2, 6


def make_held(group: int, seed: int = 0, lengths: list[int] = LENGTHS) -> Held:
    """Random entries with garbage behind each length; a third of the keys resemble an earlier one."""
    torch.manual_seed(seed)
    slots = len(lengths)
    key_SKCD = torch.randn(slots, KV_HEADS, ENTRIES, SIZE)
    for c in range(3, ENTRIES, 3):
        key_SKCD[:, :, c] = key_SKCD[:, :, c // 2] * 1.5 + 0.3 * torch.randn(slots, KV_HEADS, SIZE)
    for slot, length in enumerate(lengths):
        key_SKCD[slot, :, length:] = 1e3 * torch.randn(KV_HEADS, ENTRIES - length, SIZE)
    attention_SKC = torch.rand(slots, KV_HEADS, ENTRIES)
    query_SWHD = torch.randn(slots, WINDOW, KV_HEADS * group, SIZE)
    return Held(key_SKCD, torch.tensor(lengths), BUDGET, query_SWHD, attention_SKC)


# --- slow twins: one slot and one head, plain floats, written from the formulas


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    weights = [math.exp(v - top) for v in values]
    return [w / sum(weights) for w in weights]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def slow_importance(keys: list[list[float]], queries: list[list[list[float]]]) -> list[float]:
    """queries [W][G][D]: mean over the window of softmax(max over the group), then maximum over 7."""
    past = len(keys) - WINDOW
    rows = [softmax([max(dot(q, k) for q in heads) for k in keys[:past]]) for heads in queries]
    mean = [sum(row[j] for row in rows) / WINDOW for j in range(past)]
    return [max(mean[max(0, j - 3) : j + 4]) for j in range(past)]


def slow_redundancy(keys: list[list[float]]) -> list[float]:
    count = len(keys)
    norm = [math.sqrt(dot(k, k)) for k in keys]
    mean = [0.0] * count
    for i in range(count):
        row = [0.0 if i == j else dot(keys[i], keys[j]) / (norm[i] * norm[j]) for j in range(count)]
        similar = [j for j in range(count) if row[j] > 0.5]
        if similar:
            row[similar[-1]] = 0.0
        for j in range(count):
            mean[j] += row[j] / count
    return softmax(mean)


def slow_scores(method: str, held: Held, slot: int, head: int) -> list[float]:
    """Scores of the live entries; inf for those that stay in any case."""
    length, always = int(held.length_S[slot]), float("inf")
    keys = held.key_SKCD[slot, head, :length].tolist()
    if method == "streaming":
        return [always if j < 4 else float(j) for j in range(length)]
    if method == "h2o":
        assert held.attention_SKC is not None
        sums = held.attention_SKC[slot, head, :length].tolist()
        recent = held.budget // 2
        return sums[: length - recent] + [always] * recent
    assert held.query_SWHD is not None
    group = held.query_SWHD.shape[2] // held.key_SKCD.shape[1]
    queries = held.query_SWHD[slot, :, head * group : (head + 1) * group].tolist()
    scores = slow_importance(keys, queries)
    if method == "rkv":
        redundancy = slow_redundancy(keys)
        scores = [0.1 * a - 0.9 * redundancy[j] for j, a in enumerate(scores)]
    return scores + [always] * WINDOW


@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("method", METHODS)
def test_each_score_is_its_formula(method: str, group: int) -> None:
    for seed in range(3):
        held = make_held(group, seed)
        score_SKC = METHODS[method].score(held)
        for slot, length in enumerate(LENGTHS):
            for head in range(KV_HEADS):
                expected = slow_scores(method, held, slot, head)
                got = score_SKC[slot, head].tolist()
                assert got[:length] == pytest.approx(expected, abs=1e-6)  # float32 sums of about 1
                assert got[length:] == [float("-inf")] * (ENTRIES - length)


def test_the_similarity_that_is_spared_matters_here() -> None:
    """The slow twin has both cases: keys with a similar one, and keys with none."""
    keys = make_held(1).key_SKCD[0, 0]
    cosine = torch.nn.functional.cosine_similarity(keys[:, None], keys[None], dim=-1).fill_diagonal_(0)
    similar = (cosine > 0.5).sum(1)
    assert int((similar > 1).sum()) > 0
    assert 0 < int((similar == 0).sum()) < len(keys)


@pytest.mark.parametrize("method", METHODS)
def test_a_slots_scores_do_not_depend_on_the_slots_beside_it(method: str) -> None:
    held = make_held(4)
    assert held.query_SWHD is not None
    assert held.attention_SKC is not None
    together = METHODS[method].score(held)
    for slot, length in enumerate(LENGTHS):
        part = slice(slot, slot + 1)
        alone = Held(
            held.key_SKCD[part, :, :length],
            held.length_S[part],
            BUDGET,
            held.query_SWHD[part],
            held.attention_SKC[part, :, :length],
        )
        torch.testing.assert_close(
            METHODS[method].score(alone), together[part, :, :length], rtol=0, atol=1e-6
        )


def test_redundancy_by_blocks_of_rows_is_redundancy_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    held = make_held(4)
    whole = module.redundancy(held)
    monkeypatch.setattr(module, "EVICTION_BLOCK_BYTES", 7 * 3 * KV_HEADS * ENTRIES * 4)
    torch.testing.assert_close(module.redundancy(held), whole, rtol=0, atol=1e-7)


def test_of_equal_scores_the_earlier_entries_stay_and_what_stays_is_sorted() -> None:
    score = torch.tensor([[[1.0, 3.0, 2.0, 2.0, 2.0, float("inf"), float("-inf")]]])
    assert kept_entries(score, 4).tolist() == [[[1, 2, 3, 5]]]


# --- in place


def make_cache(slots: int = 3, layers: int = 2) -> SlotCache:
    """Keys are random; the value of entry c of (layer, slot, head) says where it stands."""
    torch.manual_seed(0)
    cache = SlotCache(
        layers=layers,
        slots=slots,
        kv_heads=KV_HEADS,
        entries=ENTRIES,
        head_size=SIZE,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    cache.key_LSKCD.normal_()
    cache.value_LSKCD[..., 0] = torch.arange(ENTRIES)
    return cache


@pytest.mark.parametrize("method", METHODS)
def test_compression_keeps_the_best_of_each_layer_and_head_in_order_and_in_place(method: Any) -> None:
    cache = make_cache(slots=4)
    eviction = Eviction(method, BUDGET, ENTRIES - BUDGET)
    memory = eviction.memory(cache, 4 * KV_HEADS)
    if isinstance(memory, LastQueries):
        memory.query_LSWHD.normal_()
    if isinstance(memory, AttentionSums):
        memory.attention_LSKC.uniform_()
    key, value = cache.key_LSKCD.clone(), cache.value_LSKCD.clone()
    address = cache.key_LSKCD.data_ptr(), cache.value_LSKCD.data_ptr()
    slots, lengths = [0, 3, 2], LENGTHS
    sets = set()
    sums = memory.attention_LSKC.clone() if isinstance(memory, AttentionSums) else None
    held = {}
    for layer in range(2):
        held[layer] = Held(
            key[layer, slots],
            torch.tensor(lengths),
            BUDGET,
            memory.query_LSWHD[layer, slots] if isinstance(memory, LastQueries) else None,
            sums[layer, slots] if sums is not None else None,
        )
    eviction.compress_(cache, memory, slots, lengths)
    assert address == (cache.key_LSKCD.data_ptr(), cache.value_LSKCD.data_ptr())
    for layer in range(2):
        for row, slot in enumerate(slots):
            for head in range(KV_HEADS):
                scores = slow_scores(method, held[layer], row, head)
                best = sorted(range(lengths[row]), key=lambda j: (-scores[j], j))[:BUDGET]
                kept = cache.value_LSKCD[layer, slot, head, :BUDGET, 0].tolist()
                assert kept == sorted(best)
                assert torch.equal(
                    cache.key_LSKCD[layer, slot, head, :BUDGET], key[layer, slot, head, sorted(best)]
                )
                if isinstance(memory, AttentionSums) and sums is not None:
                    assert torch.equal(
                        memory.attention_LSKC[layer, slot, head, :BUDGET],
                        sums[layer, slot, head, sorted(best)],
                    )
                    assert not memory.attention_LSKC[layer, slot, head, BUDGET:].any()
                sets.add(tuple(kept))
    assert (
        (len(sets) == 3) if method == "streaming" else (len(sets) > 6)
    )  # layers and heads choose for themselves
    assert torch.equal(cache.key_LSKCD[:, 1], key[:, 1])
    assert torch.equal(cache.value_LSKCD[:, 1], value[:, 1])


@pytest.mark.parametrize("kind", [LastQueries, AttentionSums])
def test_padding_is_not_remembered_and_blocks_change_nothing(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(3, 8, 20, SIZE), torch.randn(3, KV_HEADS, 20, SIZE)
    slot_B, lengths = torch.tensor([2, 0, 1]), [20, 11, 9]
    start_B = torch.zeros(3, dtype=torch.long)
    together, alone, blocks = (kind(make_cache(), 8) for _ in range(3))
    together.observe(slot_B, start_B, torch.tensor(lengths), 1, query, key, None, 0.5)
    monkeypatch.setattr(module, "EVICTION_BLOCK_BYTES", 3 * 8 * 20 * 4)
    blocks.observe(slot_B, start_B, torch.tensor(lengths), 1, query, key, None, 0.5)
    for row, length in enumerate(lengths):
        for t in range(length):
            one = slice(row, row + 1)
            at = torch.tensor([t])
            all_seen = torch.ones(1, 1, 1, t + 1, dtype=torch.bool)
            q, k = query[one, :, t : t + 1], key[one, :, : t + 1]
            alone.observe(slot_B[one], at, at + 1, 1, q, k, all_seen, 0.5)
    name = "query_LSWHD" if kind is LastQueries else "attention_LSKC"
    expected = getattr(alone, name)
    assert expected[1].abs().sum() > 0
    assert not expected[0].any()
    torch.testing.assert_close(getattr(together, name), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(getattr(blocks, name), expected, rtol=0, atol=1e-5)
    if kind is AttentionSums:  # each query of each of the 4 heads of a group gives 1 in all
        assert expected[1].sum(dim=-1).flatten().tolist() == pytest.approx([44, 44, 36, 36, 80, 80], abs=1e-4)


# --- the engine


def make_requests(lengths: list[int], samples: int = 1) -> list[Request]:
    rng = np.random.default_rng(1)
    texts = [tuple(rng.integers(8, VOCABULARY, n).tolist()) for n in lengths]
    return [Request(text, (0, i, g)) for i, text in enumerate(texts) for g in range(samples)]


def run(
    engine: Engine, requests: list[Request], max_tokens: int = 40, temperature: float = 1.0
) -> list[Rollout]:
    out = dict(engine.generate(requests, max_tokens=max_tokens, temperature=temperature))
    return [out[i] for i in range(len(requests))]


class SlowCache:
    """One sequence, a token at a time: lists of entries for each layer and KV head, and slow scores."""

    def __init__(self, method: str, budget: int, buffer: int, layers: int, group: int) -> None:
        self.method, self.budget, self.full, self.group = method, budget, budget + buffer, group
        self.entries: list[list[list[dict]]] = [[[] for _ in range(KV_HEADS)] for _ in range(layers)]
        self.queries: list[list[torch.Tensor]] = [[] for _ in range(layers)]

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any) -> tuple:
        for head, entries in enumerate(self.entries[layer]):
            entries.append({"key": key[0, head, 0], "value": value[0, head, 0], "sum": 0.0})
        return tuple(
            torch.stack([torch.stack([e[part] for e in entries]) for entries in self.entries[layer]])[None]
            for part in ("key", "value")
        )

    def observe(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, mask: object, scaling: float
    ) -> None:
        scaled_HD = query[0, :, 0] * scaling
        self.queries[layer] = [*self.queries[layer], scaled_HD][-WINDOW:]
        for head, entries in enumerate(self.entries[layer]):
            for q in scaled_HD[head * self.group : (head + 1) * self.group]:
                weights = torch.softmax(key[0, head] @ q, dim=0).tolist()
                for entry, weight in zip(entries, weights, strict=True):
                    entry["sum"] += weight

    def compress(self, threshold: int) -> None:
        for layer, heads in enumerate(self.entries):
            for head, entries in enumerate(heads):
                if len(entries) < threshold:
                    continue
                held = Held(
                    torch.stack([e["key"] for e in entries])[None, None],
                    torch.tensor([len(entries)]),
                    self.budget,
                    torch.stack(self.queries[layer])[None, :, head * self.group : (head + 1) * self.group]
                    if len(self.queries[layer]) == WINDOW
                    else None,
                    torch.tensor([e["sum"] for e in entries])[None, None],
                )
                scores = slow_scores(self.method, held, 0, 0)
                best = sorted(range(len(entries)), key=lambda j: (-scores[j], j))[: self.budget]
                heads[head] = [entries[j] for j in sorted(best)]


def slow_generate(
    decoder: Decoder, request: Request, cache: SlowCache, max_tokens: int, stops: frozenset[int]
) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities."""
    seen = {"past_key_values": cache, "observe": cache.observe}
    ids, out, logprobs = list(request.prompt_ids), [], []
    for position in range(len(ids) + max_tokens - 1):
        cache.compress(cache.full)
        hidden = decoder.embed(torch.tensor([[ids[position]]]))
        for index, arguments in enumerate(decoder.arguments(hidden, torch.tensor([[position]]))):
            with decoder.layer(index) as layer:
                hidden = layer(hidden, **(arguments | seen))
        if position >= len(request.prompt_ids) - 1:
            if position == len(request.prompt_ids) - 1:
                cache.compress(cache.budget + 1)
            with decoder.norm() as norm:
                logprob_V = torch.log_softmax(decoder.logits(norm(hidden[:, 0]))[0], dim=-1)
            ids.append(int(logprob_V.argmax()))
            out.append(ids[-1])
            logprobs.append(float(logprob_V.max()))
            if ids[-1] in stops:
                break
    return out, logprobs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_engine_is_one_sequence_at_a_time_with_slow_scores(kind: str, method: Any) -> None:
    _, decoder = make_decoder(kind)
    # shorter than the window and than the budget; of the budget; beyond it; of all entries; beyond by far
    requests = make_requests([3, 11, 12, 13, 17, 18, 50])
    eviction = Eviction(method, 12, 6)
    engine = Engine(decoder, 4, STOPS, 60, eviction=eviction)
    rollouts = run(engine, requests, temperature=0.0)
    assert engine.stats.evictions > 30
    dense = run(Engine(decoder, 4, STOPS, 60), requests, temperature=0.0)
    assert [r.response_ids.tolist() for r in rollouts] != [r.response_ids.tolist() for r in dense]
    for request, rollout in zip(requests, rollouts, strict=True):
        with torch.no_grad():
            cache = SlowCache(method, 12, 6, len(decoder.layers), 2)
            ids, logprobs = slow_generate(decoder, request, cache, 40, STOPS)
        assert rollout.response_ids.tolist() == ids
        np.testing.assert_allclose(rollout.logprob_T, logprobs, atol=1e-4)  # float32, other order of sums


@pytest.mark.parametrize("heads", [2, 14])
@pytest.mark.parametrize("method", METHODS)
def test_so_it_is_for_groups_of_one_and_of_seven(method: Any, heads: int) -> None:
    config = make_config("qwen2", layers=2, num_attention_heads=heads)
    decoder = Decoder(config, weights_of(make_model(config)))
    for prefill_tokens in (100, 5):
        requests = make_requests([4, 15, 29])
        engine = Engine(decoder, 3, STOPS, prefill_tokens, eviction=Eviction(method, 12, 6))
        rollouts = run(engine, requests, max_tokens=24, temperature=0.0)
        for request, rollout in zip(requests, rollouts, strict=True):
            with torch.no_grad():
                cache = SlowCache(method, 12, 6, 2, heads // KV_HEADS)
                ids, logprobs = slow_generate(decoder, request, cache, 24, STOPS)
            assert rollout.response_ids.tolist() == ids
            np.testing.assert_allclose(rollout.logprob_T, logprobs, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_slots_looks_and_chunks_change_nothing(method: Any) -> None:
    _, decoder = make_decoder("qwen2")
    requests = make_requests([5, 14, 30, 2], samples=3)
    eviction = Eviction(method, 12, 6)
    expected = run(Engine(decoder, 12, STOPS, 1000, eviction=eviction), requests)
    for slots, prefill, look in ((1, 1000, 0), (5, 4, 1), (3, 7, 4), (12, 20, 30)):
        engine = Engine(decoder, slots, STOPS, prefill, eviction=eviction, ahead=look)
        for one, other in zip(expected, run(engine, requests), strict=True):
            assert one.response_ids.tolist() == other.response_ids.tolist(), (slots, prefill, look)
            np.testing.assert_allclose(one.logprob_T, other.logprob_T, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_with_a_budget_of_all_tokens_nothing_is_evicted(method: Any, temperature: float) -> None:
    _, decoder = make_decoder("qwen2")
    requests = make_requests([5, 14, 30, 2], samples=2)
    dense = run(Engine(decoder, 5, STOPS, 100), requests, temperature=temperature)
    engine = Engine(decoder, 5, STOPS, 100, eviction=Eviction(method, 70, 1))
    for one, other in zip(dense, run(engine, requests, temperature=temperature), strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        np.testing.assert_allclose(one.logprob_T, other.logprob_T, atol=1e-6)
    assert engine.stats.evictions == 0


def test_a_sequence_is_remembered_apart_from_the_one_that_had_its_slot_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, decoder = make_decoder("qwen2")
    seen: list[torch.Tensor] = []
    method = module.METHODS["h2o"]

    def noted(held: Any) -> torch.Tensor:
        seen.append(held.attention_SKC.clone())
        return method.score(held)

    monkeypatch.setitem(module.METHODS, "h2o", replace(method, score=noted))
    requests = make_requests([30, 14])  # the longest is first
    runs = []
    for some in (requests, requests[1:]):
        seen.clear()
        run(Engine(decoder, 1, STOPS, 1000, eviction=Eviction("h2o", 12, 6)), some)
        runs.append(list(seen))
    both, alone = runs
    assert len(both) > len(alone) > 0
    for one, other in zip(both[-len(alone) :], alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # float32


def test_positions_stay_true_after_eviction() -> None:
    """With every entry but the sinks and the last ones gone, the distance to the sinks still counts."""
    _, decoder = make_decoder("llama")
    requests = make_requests([20, 60])
    engine = Engine(decoder, 2, STOPS, 100, eviction=Eviction("streaming", 12, 1))
    rollouts = run(engine, requests, max_tokens=8, temperature=0.0)
    for request, rollout in zip(requests, rollouts, strict=True):
        with torch.no_grad():
            cache = SlowCache("streaming", 12, 1, len(decoder.layers), 2)
            ids, _ = slow_generate(decoder, request, cache, 8, STOPS)
        assert rollout.response_ids.tolist() == ids
        assert SINKS < 12 < len(request.prompt_ids)


def make_long_decoder() -> Decoder:
    """Two small layers, 5,000 positions."""
    changes = {"layers": 2, "hidden_size": 16, "intermediate_size": 16, "head_dim": 4}
    config = make_config("qwen2", **changes, max_position_embeddings=5000)
    return Decoder(config, weights_of(make_model(config)))


@pytest.mark.parametrize("method", METHODS)
def test_the_pool_is_what_budget_and_buffer_say_whatever_the_length(method: Any) -> None:
    decoder = make_long_decoder()
    eviction = Eviction(method, 24, 40)
    requests = make_requests([5, 100])
    remembered = set()
    for max_tokens in (256, 1024, 4096) if method == "streaming" else (256, 1024):
        engine = Engine(decoder, 2, frozenset(), 1000, eviction=eviction)
        rollouts = run(engine, requests, max_tokens=max_tokens)
        assert [len(r.response_ids) for r in rollouts] == [max_tokens] * 2
        # slots x layers x KV heads x (budget + buffer) x (keys, values) x head size x float32
        assert engine.stats.cache_bytes == 2 * 2 * 2 * (24 + 40) * 2 * 4 * 4
        assert engine.stats.evictions == sum((n + max_tokens - 2 - 24) // 40 for n in (5, 24)) + 2
        remembered.add(engine.stats.memory_bytes)
    queries, sums = 2 * 2 * WINDOW * 4 * 4 * 4, 2 * 2 * 2 * 64 * 4
    assert remembered == {{"rkv": queries, "snapkv": queries, "h2o": sums, "streaming": 0}[method]}


@pytest.mark.parametrize("method", METHODS)
def test_eviction_makes_no_copy_of_the_pool(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = SlotCache(
        layers=8,
        slots=16,
        kv_heads=4,
        entries=160,
        head_size=32,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    cache.key_LSKCD.normal_()
    layer_bytes = cache.nbytes // 8  # keys and values of all slots in one layer: 2.5 MiB
    eviction = Eviction(method, 128, 32)
    memory = eviction.memory(cache, 16)
    monkeypatch.setattr(module, "EVICTION_BLOCK_BYTES", layer_bytes // 8)
    peak = peak_bytes(lambda: eviction.compress_(cache, memory, list(range(16)), [160] * 16))
    assert peak < layer_bytes
    # and the method of measuring sees a copy of the pool
    assert peak_bytes(lambda: cache.key_LSKCD[:, list(range(16))].sum()) > cache.nbytes // 2


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that torch has allocated at a time during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        call()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events))


# --- refusals


@pytest.mark.parametrize("method,least", [("rkv", 9), ("snapkv", 9), ("h2o", 2), ("streaming", 5)])
def test_a_budget_below_window_or_sinks_is_refused_with_the_least(method: Any, least: int) -> None:
    with pytest.raises(InputError, match=f"{method} with a budget of {least - 1}: it needs at least {least}"):
        Eviction(method, least - 1, 8)
    _, decoder = make_decoder("qwen2")
    engine = Engine(decoder, 3, STOPS, 100, eviction=Eviction(method, least, 1))
    assert len(run(engine, make_requests([1, 9, 30]))) == 3


def test_the_numbers_of_the_recipe_and_of_the_plan_are_those_of_the_methods() -> None:
    assert {name: method.least_budget for name, method in METHODS.items()} == LEAST_KV_BUDGET
    assert WINDOW == WINDOW_QUERIES
    assert EVICTION_BYTES == 4 * module.EVICTION_BLOCK_BYTES


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_counts_the_pool_and_what_is_remembered(method: Any) -> None:
    _, decoder = make_decoder("qwen2")
    engine = Engine(decoder, 3, STOPS, 100, eviction=Eviction(method, 20, 10))
    run(engine, make_requests([5, 40, 9, 7]), max_tokens=5)
    work = Work(
        sequences=3,
        prompt_tokens=40,
        response_tokens=5,
        storage_bytes=4,
        compute_bytes=4,
        has_host=False,
        kv_entries=30,
        eviction=method,
    )
    parts = lay_out(Shape.from_config(decoder.config.to_dict()), work, 2**30).generating
    assert parts["KV pool"] == engine.stats.cache_bytes
    assert parts["eviction"] == engine.stats.memory_bytes + EVICTION_BYTES


@pytest.mark.parametrize("method", METHODS)
def test_temporaries_stay_within_the_plan(method: Any) -> None:
    cache = SlotCache(
        layers=1,
        slots=24,
        kv_heads=4,
        entries=640,
        head_size=128,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    cache.key_LSKCD.normal_()
    eviction = Eviction(method, 512, 128)
    memory = eviction.memory(cache, 28)
    peak = peak_bytes(lambda: eviction.compress_(cache, memory, list(range(24)), [640] * 24))
    assert peak < EVICTION_BYTES
    assert peak < cache.nbytes  # of one layer


def test_a_buffer_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="at least 1 entry"):
        Eviction("rkv", 20, 0)
