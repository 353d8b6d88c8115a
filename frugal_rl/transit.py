"""Hidden states of a whole batch, where they are kept, copied to and from there while the device computes.

On the device itself nothing is copied. In the memory of a GPU's host, page-locked, all copies go through one
side stream, in the order in which they were asked for, so a state is never fetched before it has arrived:

    away      the copy waits for what has computed the state. The state's memory is held until LEAVING later
              ones have left; then the computing stream waits for its copy, and the memory is free again;
    arriving  the copy of the next state is asked for before the present one is computed with. It waits for
              what used its memory before; the computing stream waits for it when its turn comes.

So a micro-batch's states travel while its neighbours compute, and LEAVING + 1 states more are on the device;
in the backward pass, where states and slopes arrive side by side, LEAVING + 2 (memory.TRAVELLING).

Page-locked blocks are kept here from step to step: locking the tens of GiB of a large batch takes seconds,
and torch gives back all that it has cached whenever a CUDA graph is captured (torch/cuda/graphs.py). They
have torch's own sizes, powers of two. One that is free may still be read or written by a copy: the next one,
on the same stream, comes after it.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

LEAVING = 2  # states whose copies may be under way while the device goes on


class Transit:
    """Of states on `device`, kept in the memory of its host if `on_host`."""

    def __init__(self, device: torch.device, on_host: bool) -> None:
        self.device, self.on_host = device, on_host
        self.cuda: Any = torch.cuda if on_host and device.type == "cuda" else None
        self._side: Any = None
        self._leaving: deque[tuple[Tensor, Any]] = deque()
        self._free: dict[int, list[Tensor]] = {}  # page-locked blocks by their bytes

    def away(self, state: Tensor) -> Tensor:
        """A state, to where those of the whole batch are kept. No sync."""
        if not self.on_host:
            return state
        if not self.cuda:
            return torch.empty(state.shape, dtype=state.dtype, device="cpu").copy_(state)
        kept = self._locked(state)
        self._leaving.append((state, self._copied(kept, state)))
        if len(self._leaving) > LEAVING:
            self._wait(self._leaving.popleft()[1])
        return kept

    def arriving(self, states: Sequence[Tensor]) -> Iterator[Tensor]:
        """Each state on the device, in order, the next on its way. One that was yielded may be replaced."""
        if not self.cuda:
            for state in states:
                yield state.to(self.device)
            return
        ahead: tuple[Tensor, Any] | None = None
        try:
            for index in range(len(states)):
                ahead = ahead or self._fetched(states[index])
                here, arrived = ahead
                ahead = self._fetched(states[index + 1]) if index + 1 < len(states) else None
                self._wait(arrived)
                yield here
        finally:
            if ahead is not None:  # nobody wants it, or the next had no room: free only after its copy
                self._wait(ahead[1])

    def __enter__(self) -> None:
        """Until the end of the block; then no state is held on the device any more."""

    def __exit__(self, *_: object) -> None:
        while self._leaving:
            self._wait(self._leaving.popleft()[1])

    def release(self) -> None:
        """Let go of the blocks that no state is in; torch has them then."""
        for blocks in self._free.values():
            blocks.clear()

    def _locked(self, like: Tensor) -> Tensor:
        """Page-locked memory for a state; it is free again when the tensor returned is gone."""
        size = 1 << (like.nbytes - 1).bit_length()
        free = self._free.setdefault(size, [])
        block = free.pop() if free else torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
        kept = block[: like.nbytes].view(like.dtype).view(like.shape)
        weakref.finalize(kept, free.append, block).atexit = False
        return kept

    def _fetched(self, kept: Tensor) -> tuple[Tensor, Any]:
        here = torch.empty(kept.shape, dtype=kept.dtype, device=self.device)
        return here, self._copied(here, kept)

    def _copied(self, to: Tensor, source: Tensor) -> Any:
        """Copy on the side stream, after what computes now; the event that follows it."""
        if self._side is None:
            self._side = self.cuda.Stream(self.device)
        self._side.wait_stream(self.cuda.current_stream(self.device))
        with self.cuda.stream(self._side):
            to.copy_(source, non_blocking=True)
            done = self.cuda.Event()
            done.record(self._side)
        return done

    def _wait(self, done: Any) -> None:
        self.cuda.current_stream(self.device).wait_event(done)
