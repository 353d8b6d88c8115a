"""The most memory held, in all and in each phase of a step, on the device that the policy is on.

A GPU's allocator has a peak that can be set back. So has Linux for a process's resident memory: a 5 written
to /proc/self/clear_refs (man 5 proc) sets VmHWM back to what is resident now; it takes 0.1 ms. Where this
cannot be done a phase's peak is unknown, None.
"""

from __future__ import annotations

import sys

import torch

from .memory import peak_resident_bytes

SET_BACK_PEAK = "5"


class Peaks:
    """`most_bytes` is since the process began; `begin` and `end` enclose a phase. Phases do not nest."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = 0  # the most before the peak was last set back
        self._known = False

    @property
    def most_bytes(self) -> int:
        return max(self._before, self._now())

    def begin(self) -> None:
        self._before, self._known = self.most_bytes, self._set_back()

    def end(self) -> int | None:
        """The most since `begin`."""
        return self._now() if self._known else None

    def _now(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_resident_bytes()

    def _set_back(self) -> bool:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        if sys.platform != "linux":
            return False
        try:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write(SET_BACK_PEAK)
        except OSError:  # a confined process, or a kernel without it
            return False
        return True
