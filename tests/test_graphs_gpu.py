"""The engine on a GPU: graphs against the same step launched from Python, memory, and who waits for whom."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from frugal_rl.decoder import Decoder, _flash_fits, attention
from frugal_rl.generate.engine import Engine, _Run
from frugal_rl.generate.eviction import Eviction
from frugal_rl.generate.graphs import SWITCH, CudaGraphs
from frugal_rl.generate.sample import Truncation
from frugal_rl.rollout import Request, Rollout
from frugal_rl.storage import Changed, Quantised, bits_of
from frugal_rl.weights import Weights

from .conftest import make_config, make_model, weights_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # of set_sync_debug_mode, once a process: as an error it would come when the mode is set, and leave it so
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning"),
]
STOPS = frozenset({5, 7, 11})
MAX_TOKENS = 48
VOCABULARY = 512
ALL = Truncation()


def make_decoder(form: str) -> Decoder:
    """A random policy on the GPU with heads of a usual size; the int8 one has a patch over it."""
    config = make_config(
        "qwen2",
        tied=form == "int8",
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        head_dim=64,
        max_position_embeddings=512,
    )
    device = torch.device("cuda")
    tensors = weights_of(make_model(config, dtype=torch.bfloat16)).tensors
    if form == "bf16":
        return Decoder(config, Weights({n: t.to(device) for n, t in tensors.items()}))
    weights = Weights(
        {n: Quantised.of(t.to(device)) if t.ndim == 2 else t.to(device) for n, t in tensors.items()}
    )
    torch.manual_seed(1)
    changed = {}
    for name, held in weights.held.items():
        position_N = torch.nonzero(torch.rand(held.shape, device=device).view(-1) < 0.01).view(-1)
        before_N = held.at(position_N)
        after_N = (before_N.float() * 1.5 + 0.02).bfloat16()
        changed[name] = Changed(position_N, bits_of(before_N), bits_of(after_N))
    weights.write_(changed)
    return Decoder(config, weights)


def make_requests(prompts: int = 9, samples: int = 3) -> list[Request]:
    rng = np.random.default_rng(3)
    texts = [tuple(rng.integers(16, VOCABULARY, 1 + 7 * n).tolist()) for n in range(prompts)]
    return [Request(text, (0, i, g)) for i, text in enumerate(texts) for g in range(samples)]


def generate(engine: Engine, temperature: float = 1.0, truncation: Truncation = ALL) -> list[Rollout]:
    requests = make_requests()
    drawn = engine.generate(requests, max_tokens=MAX_TOKENS, temperature=temperature, truncation=truncation)
    out = dict(drawn)
    return [out[i] for i in range(len(requests))]


def make_engine(decoder: Decoder, method: Any = None, **options: Any) -> Engine:
    eviction = Eviction(method, 24, 8) if method else None
    return Engine(decoder, 10, STOPS, 40, eviction=eviction, **options)


@pytest.mark.parametrize("form", ["bf16", "int8"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", [None, "rkv", "h2o", "streaming"])
def test_graphs_draw_the_tokens_of_the_step_itself(
    form: str, temperature: float, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(make_engine(make_decoder(form), method), monkeypatch, temperature)


@pytest.mark.parametrize("truncation", [Truncation(20), Truncation(None, 0.9), Truncation(200, 0.95, 0.01)])
def test_what_truncation_sorts_is_sorted_in_a_graph_too(
    truncation: Truncation, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(make_engine(make_decoder("bf16")), monkeypatch, 1.0, truncation)


def compare(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, temperature: float, truncation: Truncation = ALL
) -> None:
    replayed = generate(engine, temperature, truncation)
    assert 0 < engine.stats.graphs < engine.stats.decode_steps / 2
    assert bool(engine.stats.evictions) == (engine.eviction is not None)
    monkeypatch.setenv(SWITCH, "off")
    plain = generate(engine, temperature, truncation)
    assert engine.stats.graphs == 0
    for one, other in zip(plain, replayed, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        np.testing.assert_allclose(one.logprob_T, other.logprob_T, atol=1e-6)  # the same kernels


@pytest.mark.parametrize("form", ["bf16", "int8"])
@pytest.mark.parametrize("ahead", [0, 3])
def test_how_late_ends_are_seen_changes_nothing(form: str, ahead: int) -> None:
    decoder = make_decoder(form)
    expected = generate(make_engine(decoder))
    for one, other in zip(expected, generate(make_engine(decoder, ahead=ahead)), strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()


def test_memory_does_not_grow_over_50_generations() -> None:
    engine = make_engine(make_decoder("int8"), "rkv")
    held = []
    for _ in range(50):
        generate(engine)
        gc.collect()
        torch.cuda.synchronize()
        free, _ = torch.cuda.mem_get_info()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), -free))
    allocated, reserved, taken = zip(*held[4:], strict=True)
    for taken_by_torch in (allocated, reserved):  # where blocks lie in their segments may change, not how far
        assert max(taken_by_torch[23:]) <= max(taken_by_torch[:23])
    # of the driver's own too, where nobody else takes any: what it keeps of a graph must not add up
    assert taken[-1] - taken[0] < 16 << 20


@pytest.mark.parametrize("form", ["bf16", "int8"])
@pytest.mark.parametrize("method", [None, "rkv", "h2o"])
def test_no_step_and_no_eviction_waits_for_the_device(
    form: str, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where waiting is an error, except while a shape is captured."""
    for name in ("run", "capture"):
        monkeypatch.setattr(CudaGraphs, name, may_wait(getattr(CudaGraphs, name)))
    decoder = make_decoder(form)
    engine = make_engine(decoder, method)
    with torch.no_grad(), decoder.sampling():
        batch = _Run(engine, make_requests(5, 2), MAX_TOKENS, 1.0, Truncation())
        batch.admit()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(40):
                batch.decode()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            batch.steps.close()
    assert 0 < engine.stats.graphs < 12
    assert engine.stats.evictions > (0 if method else -1)


def may_wait(call: Callable[..., Any]) -> Callable[..., Any]:
    def inner(*args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        try:
            return call(*args)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    return inner


def test_the_guard_sees_waiting() -> None:
    x = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            x.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_prompts_and_their_chunks_go_through_flash_attention() -> None:
    """Both ways that attention takes there: flash alone is allowed, and a dense mask gives the same."""
    torch.manual_seed(0)
    made = [torch.randn(1, n, 300, 64, dtype=torch.bfloat16, device="cuda") for n in (8, 2, 2)]
    module = torch.nn.Module()
    for queries in (300, 40):
        query, key, value = made[0][:, :, -queries:], made[1], made[2]
        row_T = torch.arange(300 - queries, 300, device="cuda")
        mask = (torch.arange(300, device="cuda") <= row_T[:, None])[None, None]
        dense, _ = attention(module, query, key, value, None, scaling=0.125, slot_mask=mask)
        assert _flash_fits(query, key, value)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            if queries == 300:
                flash, _ = attention(module, query, key, value, None, scaling=0.125)
            else:
                flash, _ = attention(
                    module, query, key, value, None, scaling=0.125, slot_mask=mask, ends_together=True
                )
        torch.testing.assert_close(flash, dense, atol=2e-2, rtol=2e-2)  # bf16, other order of sums


WAITING = """
import torch
from frugal_rl.errors import FrugalError
from frugal_rl.generate.graphs import CudaGraphs
x = torch.ones(3, device="cuda")
try:
    CudaGraphs(x.device).capture(lambda: x.sum().item())
except FrugalError as error:
    raise SystemExit(0 if "FRUGAL_RL_GRAPHS=off" in str(error) else 3)
raise SystemExit(4)
"""


def test_a_step_that_waits_cannot_be_captured_and_the_error_says_what_to_do() -> None:
    """In a process of its own: the device may be left in the middle of a capture."""
    assert subprocess.run([sys.executable, "-c", WAITING], check=False).returncode == 0
