"""Tensors that stay in a checkpoint, in host memory, and visit the device a layer at a time.

A `Source` is one tensor of a safetensors file. It is read with `preadv` from the system's page cache:
that is host memory which the system may take back, so a checkpoint larger than what is free is slower,
never an out-of-memory, and nothing is held twice.

A `LayerStream` owns two device buffers of one layer each. While a layer computes in one, a thread reads
the next layer into the other (`bring` says which are wanted; the next is guessed from the direction of
travel, up in the forward pass and down in the backward pass, and a wrong guess costs time only). On
CUDA the way is page cache -> pinned buffer -> device on a side stream, ordered by two events a buffer:

    free     recorded on the computing stream before a copy is asked for: the copy waits for it, so
             nothing that still computes with the buffer's old layer is overwritten;
    arrived  recorded after the copy: the computing stream waits for it before the layer runs, and the
             thread before it fills the pinned buffer again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoint import TensorInfo, map_tensor
from .errors import FrugalError

BLOCK = 1 << 20  # entries that pass through host memory at a time
ALIGNMENT = 256  # of tensors in a buffer


class Source:
    """One tensor on disk."""

    def __init__(self, info: TensorInfo, dtype: torch.dtype) -> None:
        self.info, self.dtype = info, dtype
        self.shape = torch.Size(info.shape)
        self.nbytes = info.nbytes

    def read_(self, out: Tensor, first: int = 0) -> Tensor:
        """Fill `out` (host memory, this dtype, contiguous) with the entries from flat position `first` on."""
        left = memoryview(out.view(-1).view(torch.uint8).numpy().data)
        offset = self.info.offset + first * self.dtype.itemsize
        with open(self.info.file, "rb", buffering=0) as file:
            while left:  # one call reads 2 GiB at most
                got = os.preadv(file.fileno(), [left], offset)
                if not got:
                    raise FrugalError(f"{self.info.file}: was cut short while it was in use; fetch it again")
                left, offset = left[got:], offset + got
        return out

    def copy_to_(self, out: Tensor, first: int = 0) -> Tensor:
        """As `read_`, but `out` may be of any format, on any device: a block at a time."""
        if out.device.type == "cpu" and out.dtype == self.dtype:
            return self.read_(out, first)
        part = torch.empty(min(BLOCK, out.numel()), dtype=self.dtype)
        flat = out.view(-1)
        for start in range(0, len(flat), BLOCK):
            here = flat[start : start + BLOCK]
            here.copy_(self.read_(part[: len(here)], first + start))
        return out

    def bits(self, index: np.ndarray) -> np.ndarray:
        """The bits of single entries, by flat position: for few, each touches a page of the file."""
        return np.asarray(map_tensor(self.info, "r")[index])

    def rows(self, row_R: np.ndarray) -> Tensor:
        """Rows [R, ...] by number, in host memory."""
        bits = map_tensor(self.info, "r").reshape(self.shape)[row_R]
        return torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(self.dtype)


class LayerStream:
    """Groups of sources (the matrices of each layer) brought to `device`, the next one ahead."""

    def __init__(self, groups: Sequence[Mapping[str, Source]], device: torch.device) -> None:
        self.groups, self.device = groups, device
        self.buffer_bytes = max(sum(_aligned(s.nbytes) for s in group.values()) for group in groups)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="frugal_rl-stream")
        self._buffers: list[_Buffer] = []
        self._in_use = 0
        self._last: int | None = None
        self._ahead: tuple[int, Future[None]] | None = None

    def bring(self, index: int) -> dict[str, Tensor]:
        """Group `index` on the device, as the checkpoint has it, in memory that may be written to.

        Valid until the second call from now at the most; the next call is the first that may reuse it.
        """
        if not self._buffers:
            self._buffers = [_Buffer(self.buffer_bytes, self.device) for _ in range(2)]
        self._in_use = 1 - self._in_use
        here, other = self._buffers[self._in_use], self._buffers[1 - self._in_use]
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead[1].result()  # also when the guess was wrong: it fills this very buffer
        if ahead is None or ahead[0] != index:
            here.release_by_compute()
            here.fill(self.groups[index])
        here.wait_arrived()
        following = self._following(index)
        self._last = index
        if following is not None:
            other.release_by_compute()
            self._ahead = following, self._thread.submit(other.fill, self.groups[following])
        return here.tensors(self.groups[index])

    def _following(self, index: int) -> int | None:
        """The next group that is likely to be wanted and is not this one."""
        top = len(self.groups) - 1
        down = self._last is not None and index < self._last
        if index == top and not down:
            return top - 1 if top else None  # the forward pass turns here
        following = index - 1 if down else index + 1
        return following if 0 <= following <= top else None

    def release(self) -> None:
        """Give the buffers' memory back; the next `bring` takes it anew."""
        if self._ahead is not None:
            self._ahead[1].result()
        for buffer in self._buffers:
            buffer.finish()
        self._buffers, self._ahead, self._last = [], None, None


class _Buffer:
    """Device memory for one group, and on CUDA its pinned twin and events."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.device = device
        self.bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self.staging = self.bytes
        self.cuda: Any = None
        if device.type == "cuda":
            self.staging = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            self.cuda = torch.cuda
            self.side = torch.cuda.Stream(device)
            self.free, self.arrived = torch.cuda.Event(), torch.cuda.Event()

    def release_by_compute(self) -> None:
        """What has been asked of the computing stream so far may still read this buffer."""
        if self.cuda:
            self.free.record(self.cuda.current_stream(self.device))

    def fill(self, group: Mapping[str, Source]) -> None:
        """Read a group; called from the thread or from the main one, never from both at once."""
        if self.cuda:
            self.arrived.synchronize()
        for name, tensor in _views(self.staging, group).items():
            group[name].read_(tensor)
        if self.cuda:
            self.side.wait_event(self.free)
            with self.cuda.stream(self.side):
                self.bytes.copy_(self.staging, non_blocking=True)
            self.arrived.record(self.side)

    def wait_arrived(self) -> None:
        if self.cuda:
            self.cuda.current_stream(self.device).wait_event(self.arrived)

    def finish(self) -> None:
        if self.cuda:
            self.arrived.synchronize()

    def tensors(self, group: Mapping[str, Source]) -> dict[str, Tensor]:
        return _views(self.bytes, group)


def _views(buffer: Tensor, group: Mapping[str, Source]) -> dict[str, Tensor]:
    """Each tensor's place in a buffer."""
    views, start = {}, 0
    for name, source in group.items():
        views[name] = buffer[start : start + source.nbytes].view(source.dtype).view(source.shape)
        start += _aligned(source.nbytes)
    return views


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
