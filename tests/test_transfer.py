"""What the engine takes from the host: numbers that wait for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from frugal_rl.generate import cache, engine, eviction
from frugal_rl.generate.engine import Engine
from frugal_rl.generate.eviction import Eviction
from frugal_rl.generate.transfer import on_device
from frugal_rl.rollout import Request

from .conftest import make_decoder


class HostNumbers(TorchDispatchMode):
    """Notes where a tensor that was made of the host's values is copied, or is an index or put at one."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, Tensor] = {}
        self.copied: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "lift_fresh" in str(func):  # what torch.tensor, x[i] = 1 and x[[0, 1]] begin with
            self.made[out.untyped_storage().data_ptr()] = out
        elif "index" in str(func) or "copy_" in str(func):
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if any(leaf.untyped_storage().data_ptr() in self.made for leaf in given):
                self.copied.append(str(func))
        return out


@pytest.mark.parametrize("method", [None, "rkv", "h2o"])
def test_numbers_go_to_the_device_through_page_locked_memory_or_with_a_launch(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each other way there waits for all that the device has been asked for."""
    for module in (cache, engine, eviction):
        monkeypatch.setattr(module, "on_device", lambda *given: on_device(*given).clone())
    _, decoder = make_decoder("qwen2")
    requests = [Request(tuple(range(8, 9 + 4 * i)), (i, g)) for i in range(3) for g in range(3)]
    own = Eviction(method, 12, 4) if method else None
    made = Engine(decoder, 4, frozenset({5, 7}), 6, eviction=own)
    with HostNumbers() as numbers:
        assert len(dict(made.generate(requests, max_tokens=20, temperature=1.0))) == 9
    assert bool(made.stats.evictions) == (method is not None)
    assert numbers.copied == []


def test_a_number_assigned_by_index_is_seen() -> None:
    x, two = torch.zeros(4), torch.ones(2)
    for assign in (
        lambda: x.__setitem__(torch.tensor([1]), 0),
        lambda: x.__setitem__(1, 0),
        lambda: x.__setitem__([0, 1], two),
    ):
        with HostNumbers() as numbers:
            assign()
        assert numbers.copied
    where_N = torch.tensor([1])
    with HostNumbers() as numbers:
        x.index_fill_(0, where_N, 3)
        x[1].zero_()
        x[1:2] = 3
    assert numbers.copied == []
