"""Recorders for the CPU: one that captures nothing, and one that does to a step what CUDA graphs do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

Action = Callable[[], None]

# what asks the device for a value, or has a shape that depends on one; and tensors made of the host's values,
# which on a GPU are copied there
WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "equal.default",
    "is_nonzero",
    "lift_fresh",
    "repeat_interleave.Tensor",
    "bincount",
    "isin",
)


def waits(func: Any, args: Any) -> bool:
    """Whether an operation would make the host wait for a GPU."""
    indexed = args[1] if "index" in str(func) and len(args) > 1 and isinstance(args[1], list | tuple) else []
    by_mask = any(isinstance(m, Tensor) and m.dtype in (torch.bool, torch.uint8) for m in indexed)
    return by_mask or any(name in str(func) for name in WAITS)


class NoAsking(TorchFunctionMode):
    """Raises where a tensor's values go to the host: on a CPU some ways there are no operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("tolist", "cpu", "numpy", "__array__", "item"):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


class AsItIs:
    """A recorder of nothing: a step is done anew each time."""

    def run(self, step: Action) -> None:
        step()

    def capture(self, step: Action) -> Action:
        return step

    def close(self) -> None:
        pass


def storages(values: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class _Recording(TorchDispatchMode):
    """Notes each operation with the very tensors it read and made, and what was there before it wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.own: dict[int, Any] = {}  # memory that was taken meanwhile
        self.before: dict[int, tuple[Any, Any]] = {}  # memory of others that was written to

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if waits(func, args):
            raise AssertionError(f"{func} waits for the device")
        places = func._schema.arguments
        named = {place.name: value for place, value in zip(places, args, strict=False)} | kwargs
        for place in places:
            if place.alias_info is not None and place.alias_info.is_write:
                for storage in storages(named.get(place.name)):
                    if storage.data_ptr() not in self.own and storage.data_ptr() not in self.before:
                        self.before[storage.data_ptr()] = storage, storage.clone()
        known = {storage.data_ptr() for storage in storages((args, kwargs))}
        out = func(*args, **kwargs)
        for storage in storages(out):
            if storage.data_ptr() not in known:
                self.own[storage.data_ptr()] = storage
        self.operations.append((func, args, kwargs, out))
        return out


class Frozen:
    """A recorder that does what CUDA graphs do, with the operations of PyTorch in place of kernels.

    A capture leaves everything outside as it was. A replay does the recorded operations on the very
    memory that they had then, with the numbers and shapes of then, and calls nothing of the step's own
    code. Between replays the memory taken by the step is somebody else's: it is full of garbage.
    """

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.closed = False

    def run(self, step: Action) -> None:
        step()

    def capture(self, step: Action) -> Action:
        self.captures += 1
        with _Recording() as recording, NoAsking():
            step()
        for storage, before in recording.before.values():
            storage.copy_(before)
        self._spoil(recording)

        def replay() -> None:
            assert not self.closed
            self.replays += 1
            for func, args, kwargs, recorded in recording.operations:
                _again(func, args, kwargs, recorded)
            self._spoil(recording)

        return replay

    def _spoil(self, recording: _Recording) -> None:
        for storage in recording.own.values():
            storage.fill_(0xAB)

    def close(self) -> None:
        self.closed = True


def _again(func: Any, args: Any, kwargs: Any, recorded: Any) -> None:
    """Do an operation whose result goes where it went when it was recorded."""
    known = {storage.data_ptr() for storage in storages((args, kwargs))}
    out = func(*args, **kwargs)

    def put(old: Any, new: Any) -> None:
        if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in known:
            assert (old.shape, old.dtype) == (new.shape, new.dtype)
            old.copy_(new)

    tree_map(put, recorded, out)
