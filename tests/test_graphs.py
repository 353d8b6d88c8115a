"""The decode step, captured and replayed: the tokens of the step as it is, whatever happens between replays.

Here on a CPU (frozen.py says how), where CUDA graphs can be: test_graphs_gpu.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from frugal_rl import decoder as decoder_module
from frugal_rl.decoder import Decoder
from frugal_rl.errors import FrugalError, InputError
from frugal_rl.generate import graphs
from frugal_rl.generate.engine import Engine
from frugal_rl.generate.eviction import Eviction
from frugal_rl.generate.graphs import Recorder, Steps, recorder_for, rung
from frugal_rl.generate.sample import StopText, Truncation
from frugal_rl.rollout import Request, Rollout
from frugal_rl.storage import Changed, Quantised, bits_of
from frugal_rl.weights import Weights

from .conftest import VOCABULARY, make_config, make_decoder, make_model, weights_of
from .frozen import AsItIs, Frozen

CPU = torch.device("cpu")
STOPS = frozenset({5, 7})


def make_requests(prompts: int = 6, samples: int = 3) -> list[Request]:
    """Ragged prompts of 1 to 11 tokens."""
    rng = np.random.default_rng(3)
    texts = [tuple(rng.integers(8, VOCABULARY, 1 + 2 * n).tolist()) for n in range(prompts)]
    return [Request(text, (0, i, g)) for i, text in enumerate(texts) for g in range(samples)]


def quantised_decoder(*, tied: bool = True, share: float = 0.02) -> Decoder:
    """A random int8 policy; that share of its entries is changed, in some rows of a matrix many."""
    config = make_config("qwen2", tied=tied)
    tensors = weights_of(make_model(config, dtype=torch.bfloat16)).tensors
    weights = Weights({n: Quantised.of(t) if t.ndim == 2 else t for n, t in tensors.items()})
    generator = torch.Generator().manual_seed(1)
    changed = {}
    for name, held in weights.held.items():
        mask = torch.rand(held.shape, generator=generator) < share
        if mask.ndim == 2:
            mask[8] = True
        position_N = torch.nonzero(mask.view(-1)).view(-1)
        before_N = held.at(position_N)
        after_N = (before_N.float() * 1.5 + 0.02).bfloat16()
        changed[name] = Changed(position_N, bits_of(before_N), bits_of(after_N))
    weights.write_(changed)
    return Decoder(config, weights)


def run(
    decoder: Decoder, recorder: Callable[[], Recorder], *, temperature: float = 1.0, **options: Any
) -> tuple[list[Rollout], Engine]:
    truncation = options.pop("truncation", Truncation())
    options = {"slots": 5, "stop_ids": STOPS, "prefill_tokens": 9} | options
    engine = Engine(decoder, recorder=lambda _: recorder(), **options)
    requests = make_requests()
    out = dict(engine.generate(requests, max_tokens=20, temperature=temperature, truncation=truncation))
    return [out[i] for i in range(len(requests))], engine


def check_frozen(decoder: Decoder, temperature: float = 1.0, **options: Any) -> Engine:
    """Replays give the bits of the step as it is, for every request."""
    options["temperature"] = temperature
    expected, _ = run(decoder, AsItIs, **options)
    made: list[Frozen] = []

    def make() -> Frozen:
        made.append(Frozen())
        return made[-1]

    rollouts, engine = run(decoder, make, **options)
    for one, other in zip(expected, rollouts, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        assert np.array_equal(one.logprob_T, other.logprob_T)
        assert np.array_equal(one.policy_logprob_T, other.policy_logprob_T)
    (recorder,) = made
    assert engine.stats.graphs == recorder.captures
    assert recorder.captures + recorder.replays == engine.stats.decode_steps
    assert recorder.replays > recorder.captures > 2
    assert recorder.closed
    assert temperature == 0 or len({len(r.response_ids) for r in rollouts}) > 3
    return engine


@pytest.mark.parametrize(
    "method, temperature", [(None, 0.0), (None, 1.0), ("rkv", 1.0), ("h2o", 0.0), ("streaming", 1.0)]
)
def test_replays_are_the_step_itself_with_admission_retirement_and_eviction(
    method: Any, temperature: float
) -> None:
    _, decoder = make_decoder("qwen2")
    eviction = Eviction(method, 12, 6) if method else None
    engine = check_frozen(decoder, temperature=temperature, eviction=eviction)
    assert bool(engine.stats.evictions) == (method is not None)


@pytest.mark.parametrize("resident_bytes", [0, decoder_module.RESIDENT_BYTES])
@pytest.mark.parametrize("tied", [True, False])
def test_replays_are_the_step_itself_on_int8_weights_under_a_patch(
    tied: bool, resident_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_module, "RESIDENT_BYTES", resident_bytes)
    monkeypatch.setattr(decoder_module, "HEAD_BLOCK_BYTES", 4 * 64 * 40)  # the head in three blocks
    check_frozen(quantised_decoder(tied=tied), eviction=Eviction("rkv", 12, 6))


def test_replays_are_the_step_itself_where_the_host_is_ahead_and_truncates_and_looks_for_strings() -> None:
    _, decoder = make_decoder("llama")
    text = StopText(("ba",), lambda ids: "".join("abcdefgh"[i % 8] for i in ids))
    check_frozen(decoder, ahead=2, truncation=Truncation(20, 0.9, 0.01), stop_text=text)


def test_in_bf16_arithmetic_replays_are_the_step_itself() -> None:
    config = make_config("qwen3")
    tensors = weights_of(make_model(config, dtype=torch.bfloat16)).tensors
    check_frozen(Decoder(config, Weights(tensors, compute_dtype=torch.bfloat16)))


def test_a_patched_int8_policy_samples_as_its_dense_twin_does() -> None:
    decoder = quantised_decoder()
    twin = Decoder(decoder.config, Weights(decoder.weights.tensors))
    for one, other in zip(run(decoder, AsItIs)[0], run(twin, AsItIs)[0], strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        np.testing.assert_allclose(one.logprob_T, other.logprob_T, atol=1e-5)


# --- what replays cannot do is seen


def test_a_capture_changes_nothing_and_a_replay_everything_again() -> None:
    total, added = torch.zeros(3), torch.ones(3)
    again = Frozen().capture(lambda: total.add_(added * 2))
    assert total.tolist() == [0, 0, 0]
    again()
    added.fill_(5)
    again()
    assert total.tolist() == [12, 12, 12]


def test_a_number_of_the_hosts_is_that_of_the_capture() -> None:
    total, count = torch.zeros(1), [1]
    again = Frozen().capture(lambda: total.add_(count[0]))
    count[0] = 100
    again()
    assert total.tolist() == [1]


def test_what_a_step_takes_is_gone_when_it_is_over() -> None:
    kept: list[torch.Tensor] = []
    again = Frozen().capture(lambda: kept.append(torch.ones(3) * 2))
    again()
    assert kept[0].view(torch.uint8).unique().tolist() == [0xAB]


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: float(x[0]),
        lambda x: bool(x[0]),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.long().unique(),
        lambda x: torch.tensor([1.0, 2.0]) + x[:2],
        lambda x: torch.isin(x, x[:1]),
        lambda x: torch.repeat_interleave(x.long()),
    ],
)
def test_a_step_that_waits_for_the_device_is_refused(ask: Callable[[torch.Tensor], object]) -> None:
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="waits for the device"):
        Frozen().capture(lambda: ask(x) and None)


# --- shapes and choices


def test_a_rung_holds_its_count_and_little_more() -> None:
    rungs = sorted({rung(n, 5000) for n in range(1, 5000)})
    assert rungs[:12] == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192]
    assert rungs[-1] == 5000
    for n in range(1, 5000):
        assert n <= rung(n, 5000) <= (2 * n if n < 16 else 1.5 * n)
        assert rung(n, n + 1) <= n + 1
    assert all(rung(n, 5000) == n for n in rungs)


def test_a_shape_is_done_once_as_it_is_and_then_replayed() -> None:
    done: list[str] = []

    class Noting:
        def run(self, step: Callable[[], None]) -> None:
            done.append("run")
            step()

        def capture(self, step: Callable[[], None]) -> Callable[[], None]:
            done.append("capture")
            return lambda: done.append("replay")

        def close(self) -> None:
            done.append("close")

    steps = Steps(lambda slots, columns: done.append(f"step {slots} {columns}"), Noting())
    for shape in ((4, 8), (4, 8), (4, 16), (4, 8)):
        steps(*shape)
    assert done == ["run", "step 4 8", "capture", "replay", "run", "step 4 16", "capture", "replay"]
    assert steps.shapes == [(4, 8), (4, 16)]
    steps.close()
    assert done[-1] == "close"
    assert not steps.shapes
    plain = Steps(lambda slots, columns: done.append(f"plain {slots}"), None)
    plain(1, 2)
    plain(1, 2)
    assert done[-2:] == ["plain 1", "plain 1"]
    assert not plain.shapes


def test_leaving_early_or_failing_closes_the_recorder() -> None:
    _, decoder = make_decoder("qwen2")
    recorder = Frozen()
    engine = Engine(decoder, 4, STOPS, 100, recorder=lambda _: recorder)
    stream = engine.generate(make_requests(), max_tokens=24, temperature=1.0)
    next(stream)
    assert not recorder.closed
    stream.close()
    assert recorder.closed


def test_the_switch_turns_graphs_off_and_knows_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.device] = []
    monkeypatch.setattr(graphs, "CudaGraphs", lambda device: made.append(device) or Frozen())
    monkeypatch.delenv(graphs.SWITCH, raising=False)
    cuda = torch.device("cuda", 0)
    assert recorder_for(CPU) is None
    assert isinstance(recorder_for(cuda), Frozen)
    assert made == [cuda]
    monkeypatch.setenv(graphs.SWITCH, "off")
    assert recorder_for(cuda) is None
    monkeypatch.setenv(graphs.SWITCH, "on")
    with pytest.raises(InputError, match="FRUGAL_RL_GRAPHS is 'on', expected one of auto, off"):
        recorder_for(cuda)


@pytest.mark.parametrize(
    ("message", "kind"),
    [("CUDA error: out of memory", RuntimeError), ("CUDA error: operation not permitted", FrugalError)],
)
def test_a_capture_that_fails_leaves_the_stream_and_a_shortage_of_memory_is_one(
    message: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch.cuda.graph ends: what capture_end raises comes before its stream is put back."""
    streams: list[str] = []

    @contextmanager
    def graph(made: object, **options: object) -> Iterator[None]:
        streams.append("side")
        yield
        raise RuntimeError(message)

    for name, value in {
        "graph": graph,
        "CUDAGraph": object,
        "graph_pool_handle": lambda: (0, 1),
        "current_stream": lambda device: "main",
        "set_stream": streams.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(graphs, "side_stream", lambda device: "side")
    with pytest.raises(kind, match=message) as caught:
        graphs.CudaGraphs(torch.device("cuda")).capture(lambda: None)
    assert caught.type is kind
    assert streams == ["side", "main"]


def test_a_model_whose_frequencies_follow_the_positions_is_not_captured() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = make_config("llama", rope_parameters=rope)
    decoder = Decoder(config, weights_of(make_model(config)))
    assert not decoder.steady
    assert make_decoder("llama")[1].steady
    recorder = Frozen()
    _, engine = run(decoder, lambda: recorder)
    assert engine.stats.graphs == recorder.captures == 0
