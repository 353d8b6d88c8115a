"""What is done when memory runs out: the phase goes on with less, and says so.

Learning halves its micro-batches (update.within_memory). Generating halves its slots, here: what has ended
is kept, what has not begins anew. A request's random numbers are its own, whatever the slot, so it draws the
same tokens again, up to the order of sums.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from .errors import FrugalError, OutOfMemory
from .generate.sample import Sampler, Truncation
from .rollout import Request, Rollout

# of errors without a class of their own: the CPU's allocator; CUDA itself where it locks host memory, Triton
# where it loads a kernel; cuBLAS where it makes a handle
WORDS = ("can't allocate memory", "CUDA error: out of memory", "CUDA]: out of memory", "STATUS_ALLOC_FAILED")


def is_out_of_memory(error: Exception) -> bool:
    """That of PyTorch's allocator for a GPU has a class, and llama.cpp's; others only words."""
    return isinstance(error, torch.OutOfMemoryError | OutOfMemory) or any(
        words in str(error) for words in WORDS
    )


def give_back(device: torch.device) -> None:
    """Free what a phase that failed has left, so that the next attempt finds it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # memory that a copy is under way to or from stays cached
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # page-locked memory, as torch.cuda.graph does it


@dataclass
class Surviving:
    """A sampler that goes on with half its slots when memory runs out; later calls keep the fewer slots."""

    sampler: Sampler
    device: torch.device
    say: Callable[[str], None]

    @property
    def slots(self) -> int:
        return self.sampler.slots

    @slots.setter
    def slots(self, count: int) -> None:
        self.sampler.slots = count

    def generate(
        self,
        requests: Sequence[Request],
        *,
        max_tokens: int,
        temperature: float,
        truncation: Truncation = Truncation(),  # noqa: B008 (frozen)
    ) -> Iterator[tuple[int, Rollout]]:
        """As Engine.generate. Raises FrugalError where not even one slot fits."""
        waiting = list(range(len(requests)))
        while waiting:
            ended: set[int] = set()
            try:
                stream = self.sampler.generate(
                    [requests[index] for index in waiting],
                    max_tokens=max_tokens,
                    temperature=temperature,
                    truncation=truncation,
                )
                with closing(stream):  # type: ignore[type-var]
                    for place, rollout in stream:
                        ended.add(place)
                        yield waiting[place], rollout
                return
            except (RuntimeError, OutOfMemory) as error:
                if not is_out_of_memory(error):
                    raise
                if self.slots == 1:
                    raise FrugalError(
                        f"out of memory while generating in one slot: {error}; take a smaller "
                        "rollout.max_tokens or rollout.kv_budget, or a smaller model"
                    ) from error
            self.slots = max(1, min(self.slots, len(waiting)) // 2)
            waiting = [index for place, index in enumerate(waiting) if place not in ended]
            give_back(self.device)
            self.say(f"out of memory while generating: {len(waiting)} responses go on in {self.slots} slots")
