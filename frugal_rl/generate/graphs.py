"""A decode step that is captured once and then replayed: its kernels are launched by the device itself.

A step is hundreds of kernels, each over in microseconds: launched from Python one by one, the device would
wait for the next. `Steps` runs a step of some shape as it is the first time, captures it, and replays it from
then on. What a replay does is fixed but for the values in the buffers that it reads and writes, so a step

- has shapes that follow from its arguments alone (`rung`: few of them, each a graph);
- reads from and writes to buffers that live as long as the graphs, and leaves nothing else behind;
- asks the device for no value, and changes no state of the host's.

The graphs share one memory pool, which holds what a step needs meanwhile: they never run at the same time.
The slots of a run are all in use until its queue is empty, so the shapes with most slots come first, and the
others find room in what those have left. A graph holds the addresses of everything it touches: weights,
cache and buffers. So graphs live no longer than one `generate` call, and the pool goes with them.

The environment variable FRUGAL_RL_GRAPHS says which path runs, `off` being the same step, launched by Python:

- auto (default): graphs on a CUDA device, for models whose step asks the device nothing (Decoder.steady);
- off: none.

Source: torch.cuda.graph's notes on private pools; the shared pool and the falling order of shapes are those
of nano-vllm (model_runner.py) and vLLM. Differs: captured when first needed and not before the start, because
most shapes never occur; the step that warms up is a step of the run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Protocol

import torch

from ..errors import FrugalError, InputError

SWITCH = "FRUGAL_RL_GRAPHS"
CHOICES = ("auto", "off")
FINE_FROM = 16  # from here on a rung between two powers of two: at most a third of a shape is idle

Action = Callable[[], None]


def rung(count: int, most: int) -> int:
    """The least of 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, ... that holds `count`; at most `most`."""
    power = 1 << (count - 1).bit_length()
    between = power * 3 // 4
    return min(most, between if power > FINE_FROM and count <= between else power)


class Recorder(Protocol):
    """Who captures."""

    def run(self, step: Action) -> None:
        """Do the step where it is going to be captured."""

    def capture(self, step: Action) -> Action:
        """What does the step again whenever it is called; the step is not done now."""

    def close(self) -> None:
        """What was captured is not used any more."""


class CudaGraphs:
    """CUDA graphs in one memory pool. Raises FrugalError for a step that cannot be captured."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # of this call alone: a pool whose graphs are gone cannot be captured into again
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = side_stream(device)
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def run(self, step: Action) -> None:
        """See Recorder."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            step()
        current.wait_stream(self._stream)

    def capture(self, step: Action) -> Action:
        """See Recorder. Syncs with the device."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                step()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:  # an operation that waits for the device, or a library's that must not
            torch.cuda.set_stream(current)  # torch.cuda.graph leaves the other one where a capture ends so
            if "out of memory" in str(error):  # the driver's: a graph takes some beside PyTorch's
                raise
            raise FrugalError(
                f"the decode step could not be captured in a CUDA graph ({error}); set {SWITCH}=off"
            ) from error
        self._graphs.append(graph)
        return graph.replay

    def close(self) -> None:
        """See Recorder. The pool's memory can be used by everybody again. Syncs with the device."""
        torch.cuda.synchronize(self.device)  # no graph is destroyed while it runs
        for graph in self._graphs:
            graph.reset()
        self._graphs = []
        torch.cuda.empty_cache()


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where steps warm up and are captured. One for all calls: cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream(device)


def recorder_for(device: torch.device) -> Recorder | None:
    """The recorder of one `generate` call; None: no graphs. Raises InputError for an unknown choice."""
    choice = os.environ.get(SWITCH, "auto")
    if choice not in CHOICES:
        raise InputError(f"{SWITCH} is {choice!r}, expected one of {', '.join(CHOICES)}")
    return CudaGraphs(device) if choice == "auto" and device.type == "cuda" else None


class Steps:
    """Does `step(*shape)`: the first time as it is, then as it was captured; without a recorder as it is."""

    def __init__(self, step: Callable[..., None], recorder: Recorder | None) -> None:
        self.step: Callable[..., None] | None = step
        self.recorder = recorder
        self.capture_s = 0.0
        self._captured: dict[tuple[int, ...], Action] = {}

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of what is captured, in that order."""
        return list(self._captured)

    def __call__(self, *shape: int) -> None:
        assert self.step is not None, "closed"
        captured = self._captured.get(shape)
        if captured is not None:
            captured()
        elif self.recorder is None:
            self.step(*shape)
        else:
            step = partial(self.step, *shape)
            self.recorder.run(step)
            began = time.perf_counter()
            self._captured[shape] = self.recorder.capture(step)
            self.capture_s += time.perf_counter() - began

    def close(self) -> None:
        """Nothing captured is left, nor the step: its owner holds this, and a cycle would keep its memory."""
        self.step, self._captured = None, {}
        if self.recorder is not None:
            self.recorder.close()
