"""Small tensors between host and device, in the order of the device's stream, while neither waits.

A copy from pageable memory, such as `torch.tensor(values, device="cuda")` makes, waits until the device has
done everything before it; one between page-locked memory and the device does not. On a CPU all is at once.

A number that is assigned by index is such a copy too: of `x[i] = 0` torch makes a tensor of the host's first
(pytorch/pytorch#186482, #186486), be `i` a tensor or an integer. `index_fill_` and `zero_` take it along.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(values: Tensor | Sequence[object], device: torch.device) -> Tensor:
    """Numbers of the host (a list, or a tensor) on the device. No sync."""
    tensor = values if isinstance(values, Tensor) else torch.tensor(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Arriving:
    """Copies of tensors as they are now, on their way to the host."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        if tensors[0].device.type != "cuda":
            self._copies = [tensor.clone() for tensor in tensors]
            return
        self._copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        for copy, tensor in zip(self._copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> list[Tensor]:
        """The copies, once they are there. Waits for nothing that was asked of the device later."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies
