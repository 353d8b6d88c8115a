"""Memory that runs out while generating, and memory that must not grow."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from frugal_rl.errors import FrugalError
from frugal_rl.generate.engine import Engine
from frugal_rl.generate.sample import Truncation
from frugal_rl.learn import Learner
from frugal_rl.rollout import Request, Rollout
from frugal_rl.shortage import Surviving, give_back

from .conftest import make_decoder, make_rollouts

CPU = torch.device("cpu")
STOPS = frozenset({5})


class Short:
    """A sampler with memory for `fits` slots: with more, it fails after two responses."""

    def __init__(self, slots: int, fits: int) -> None:
        self.slots, self.fits, self.calls = slots, fits, 0
        self.rollout = make_rollouts(1)[0]

    def generate(
        self, requests: Sequence[Request], *, max_tokens: int, temperature: float, truncation: Truncation
    ) -> Iterator[tuple[int, Rollout]]:
        self.calls += 1
        for place in reversed(range(len(requests))):
            if min(self.slots, len(requests)) > self.fits and place < len(requests) - 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            yield place, self.rollout


def make_requests(count: int) -> list[Request]:
    return [Request((8, 9 + i % 3, 11), (0, i)) for i in range(count)]


def test_generating_goes_on_with_half_the_slots_and_says_so() -> None:
    said: list[str] = []
    short = Short(slots=16, fits=4)
    sampler = Surviving(short, CPU, said.append)
    ended = [index for index, _ in sampler.generate(make_requests(20), max_tokens=4, temperature=1.0)]
    assert sorted(ended) == list(range(20))  # each once
    assert (short.slots, sampler.slots, short.calls) == (4, 4, 3)
    assert said == [
        "out of memory while generating: 18 responses go on in 8 slots",
        "out of memory while generating: 16 responses go on in 4 slots",
    ]
    list(sampler.generate(make_requests(20), max_tokens=4, temperature=1.0))
    assert short.calls == 4  # the fewer slots stay


def test_fewer_requests_than_slots_are_halved_too() -> None:
    short = Short(slots=64, fits=3)
    assert (
        len(
            list(
                Surviving(short, CPU, lambda _: None).generate(
                    make_requests(6), max_tokens=4, temperature=1.0
                )
            )
        )
        == 6
    )
    assert short.slots == 3


def test_one_slot_that_does_not_fit_ends_the_run_with_advice() -> None:
    sampler = Surviving(Short(slots=2, fits=0), CPU, lambda _: None)
    with pytest.raises(FrugalError, match=r"one slot.*2\.00 GiB.*kv_budget"):
        list(sampler.generate(make_requests(9), max_tokens=4, temperature=1.0))


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    class Broken(Short):
        def generate(self, *arguments: Any, **options: Any) -> Any:
            raise RuntimeError("device-side assert")

    with pytest.raises(RuntimeError, match="device-side"):
        list(Surviving(Broken(4, 4), CPU, print).generate(make_requests(3), max_tokens=4, temperature=1.0))


def test_what_begins_anew_draws_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    _, decoder = make_decoder("qwen2")
    requests = make_requests(12)

    def tokens(sampler: Any) -> dict[int, list[int]]:
        found = sampler.generate(requests, max_tokens=9, temperature=1.0)
        return {index: rollout.response_ids.tolist() for index, rollout in found}

    expected = tokens(Engine(decoder, 8, STOPS, 30))
    logits, calls = decoder.logits, []

    def short(hidden_BD: torch.Tensor) -> torch.Tensor:
        calls.append(len(hidden_BD))
        if len(calls) == 7:  # in the middle of responses
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits(hidden_BD)

    monkeypatch.setattr(decoder, "logits", short)
    engine = Engine(decoder, 8, STOPS, 30)
    assert tokens(Surviving(engine, CPU, lambda _: None)) == expected
    assert engine.slots == 4


def test_on_a_gpu_device_and_host_memory_are_given_back_once_nothing_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    for owner, name in (
        (torch.cuda, "synchronize"),
        (torch.cuda, "empty_cache"),
        (torch._C, "_host_emptyCache"),
    ):
        monkeypatch.setattr(owner, name, lambda *_, name=name: done.append(name), raising=False)
    give_back(CPU)
    assert done == []
    give_back(torch.device("cuda"))
    assert done == ["synchronize", "empty_cache", "_host_emptyCache"]


def live_bytes() -> int:
    """Of all tensors' storages."""
    gc.collect()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if isinstance(t, torch.Tensor) and not t.is_meta
    }
    return sum(storages.values())


@pytest.mark.filterwarnings("ignore")
def test_nothing_but_the_patch_grows_over_40_steps() -> None:
    _, decoder = make_decoder("qwen2", dtype=torch.bfloat16)
    sampler = Surviving(Engine(decoder, 4, STOPS, 40), CPU, lambda _: None)
    learner = Learner(decoder, 0.05, 1.0, 1.0, 60, boundary_every=2)
    advantage_B = torch.linspace(-1, 1, 6)
    held = []
    for step in range(40):
        requests = [Request((8, 9, 10 + i), (step, i)) for i in range(6)]
        rollouts = [r for _, r in sampler.generate(requests, max_tokens=8, temperature=1.0)]
        done = learner.step(rollouts, lambda logprob_BT: (-(logprob_BT.sum(1) * advantage_B).mean(), {}))
        assert done.commit.entries
        del done, rollouts
        if step in (4, 39):
            patch = sum(overlay.nbytes for overlay in decoder.weights.overlay.values())
            held.append(live_bytes() - patch)
    assert held[0] == held[1]
