"""States on their way to and from the host: the order of copies, against a device that only takes notes."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from frugal_rl.learn import Learner
from frugal_rl.transit import LEAVING, Transit
from frugal_rl.update import within_memory

from .conftest import make_decoder

CPU = torch.device("cpu")


class Device:
    """Stands for torch.cuda: runs copies at once, and notes who waited for which event."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, int]] = []
        self.recorded = 0
        self.compute = _Stream(self, "compute")

    def Stream(self, device: torch.device) -> Any:
        return _Stream(self, "side")

    def Event(self) -> Any:
        return _Event(self)

    def current_stream(self, device: torch.device) -> Any:
        return self.compute

    @contextmanager
    def stream(self, stream: Any) -> Any:
        yield

    def waited(self) -> list[int]:
        """Copies that the computing stream has waited for, by number."""
        return [number for name, number in self.notes if name == "compute waits"]


class _Stream:
    def __init__(self, device: Device, name: str) -> None:
        self.device, self.name = device, name

    def wait_event(self, event: Any) -> None:
        self.device.notes.append((f"{self.name} waits", event.number))

    def wait_stream(self, stream: Any) -> None:
        self.device.notes.append((f"{self.name} waits for {stream.name}", self.device.recorded))


class _Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self, stream: Any) -> None:
        self.number = self.device.recorded
        self.device.recorded += 1
        self.device.notes.append(("copied", self.number))


def make_transit(monkeypatch: Any) -> tuple[Transit, Device]:
    transit, device = Transit(CPU, True), Device()
    transit.cuda = device
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    return transit, device


def states(count: int) -> list[Tensor]:
    return [torch.full((2, 3), float(i)) for i in range(count)]


def test_the_next_state_is_on_its_way_before_the_present_one_is_computed_with(monkeypatch) -> None:
    transit, device = make_transit(monkeypatch)
    for index, here in enumerate(transit.arriving(states(4))):
        assert torch.equal(here, states(4)[index])
        assert device.recorded == min(index + 2, 4)  # copies asked for
        assert device.waited() == list(range(index + 1))  # in order, each before it is used
    # every copy waited for what had been asked of the computing stream before it
    assert sum(name == "side waits for compute" for name, _ in device.notes) == 4


def test_a_state_that_leaves_is_held_until_its_copy_was_waited_for(monkeypatch) -> None:
    transit, device = make_transit(monkeypatch)
    with transit:
        for index, state in enumerate(states(5)):
            assert torch.equal(transit.away(state), state)
            assert len(transit._leaving) == min(index + 1, LEAVING)
            assert device.waited() == list(range(index + 1 - len(transit._leaving)))
    assert not transit._leaving
    assert device.waited() == list(range(5))


def test_a_loop_that_is_left_waits_for_the_copy_that_nobody_wants(monkeypatch) -> None:
    transit, device = make_transit(monkeypatch)
    arriving = transit.arriving(states(3))
    next(arriving)
    assert device.waited() == [0]
    arriving.close()
    assert device.waited() == [0, 1]


def test_page_locked_memory_is_kept_from_step_to_step(monkeypatch) -> None:
    transit, _ = make_transit(monkeypatch)
    made: list[int] = []
    empty = torch.empty

    def note(*sizes: Any, **options: Any) -> Tensor:
        made.extend([sizes[0]] if options.get("dtype") == torch.uint8 else [])
        return empty(*sizes, **options)

    monkeypatch.setattr(torch, "empty", note)
    for step in range(3):
        with transit:
            kept = [transit.away(state + step) for state in states(4)]
            assert all(torch.equal(k, s + step) for k, s in zip(kept, states(4), strict=True))
            kept[1] = transit.away(torch.ones(5, dtype=torch.bfloat16))  # 10 bytes: a block of 16
            assert torch.equal(kept[0], states(4)[0] + step)
            del kept
    assert made == [32] * 4 + [16]  # 24 bytes a state, rounded up as torch does it
    transit.release()
    with transit:
        transit.away(states(1)[0])
    assert made == [32] * 4 + [16, 32]


def test_when_memory_runs_out_the_blocks_go_and_another_model_shares_them() -> None:
    _, decoder = make_decoder("qwen2")
    reference = Learner(decoder, 0.1, None, 1.0, 100, boundary_on_host=True)
    learner = Learner(decoder, 0.1, None, 1.0, 100, boundary_on_host=True, reference=reference)
    assert reference._transit is learner._transit
    learner._transit._free = {64: [torch.empty(64)]}
    attempts = []

    def work() -> None:
        attempts.append(sum(map(len, learner._transit._free.values())))
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    within_memory(learner, lambda _: None, work)
    assert attempts == [1, 0] and learner.micro_tokens == 50


def test_a_state_that_is_in_use_is_nobody_elses_block(monkeypatch) -> None:
    transit, _ = make_transit(monkeypatch)
    with transit:
        first = transit.away(states(2)[1])
        others = [transit.away(state) for state in states(9)]
        assert torch.equal(first, states(2)[1])
        del first
        again = transit.away(states(3)[2])
    assert torch.equal(again, states(3)[2])
    assert all(torch.equal(k, s) for k, s in zip(others, states(9), strict=True))


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_a_state_that_has_no_room_leaves_no_copy_under_way(fails, monkeypatch) -> None:
    """Else the copy before it would still be under way into memory that is free."""
    transit, device = make_transit(monkeypatch)
    empty, asked = torch.empty, []

    def short(*sizes: Any, **options: Any) -> Tensor:
        asked.append(sizes)
        if len(asked) == fails + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*sizes, **options)

    monkeypatch.setattr(torch, "empty", short)
    with pytest.raises(torch.OutOfMemoryError):
        list(transit.arriving(states(4)))
    assert device.recorded == fails
    assert set(device.waited()) == set(range(fails))


def test_on_the_device_itself_nothing_is_copied() -> None:
    kept = states(3)
    transit = Transit(CPU, False)
    assert [transit.away(state) for state in kept] == kept
    assert all(here is state for here, state in zip(transit.arriving(kept), kept, strict=True))
