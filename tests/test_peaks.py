"""Peak memory by phase, on a CPU."""

from __future__ import annotations

import sys

import pytest
import torch

from frugal_rl import peaks
from frugal_rl.memory import peak_resident_bytes
from frugal_rl.peaks import Peaks

MIB = 1 << 20


def touch(count_bytes: int) -> None:
    torch.ones(count_bytes, dtype=torch.uint8)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/clear_refs")
def test_a_phase_has_a_peak_of_its_own_and_the_whole_keeps_the_largest() -> None:
    """Blocks of 300 and 100 MiB; within 60 MiB, which what the process holds besides may differ by."""
    held = Peaks(torch.device("cpu"))
    held.begin()
    touch(300 * MIB)
    first = held.end()
    held.begin()
    touch(100 * MIB)
    second = held.end()
    assert first is not None and second is not None
    assert first - second == pytest.approx(200 * MIB, abs=60 * MIB)
    assert peak_resident_bytes() < first
    assert held.most_bytes >= first
    held.begin()
    assert held.most_bytes >= first


def test_where_the_peak_cannot_be_set_back_a_phases_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError("made here")

    monkeypatch.setattr(peaks, "open", refused, raising=False)
    held = Peaks(torch.device("cpu"))
    held.begin()
    assert held.end() is None
    assert held.most_bytes > 10 * MIB


def test_on_a_gpu_the_allocators_own_peak_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = [0]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.__setitem__(0, 10))
    held = Peaks(torch.device("cuda"))
    peak[0] = 500  # while loading
    held.begin()
    peak[0] = 300
    assert held.end() == 300
    held.begin()
    assert (held.end(), held.most_bytes) == (10, 500)
