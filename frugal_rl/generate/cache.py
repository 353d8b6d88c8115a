"""The KV cache of all slots: one preallocated buffer, a fixed count of entries a slot.

A slot holds one sequence. Slots [0, active) are in use, the others are free: a sequence that ends
gives its place to the last active one (`move`), so that a decode step works on a prefix of the buffer
and never on free slots. Bytes: 2 * slots * layers * KV heads * entries * head size * element size,
whatever is in it.

An entry is a token's key, rotated to its true position, and its value. Entries of a slot stand in the
order of their positions; under eviction (eviction.py) some are missing, other ones in each layer and KV
head, but all hold equally many.

Transformers' attention modules see it through `Prefill`, `Extend` and `Decode`, which have the one
method of a transformers cache that they call, `update(key, value, layer)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..decoder import Live
from ..kernels.choice import use_triton
from .transfer import on_device


class SlotCache:
    """Keys and values [L, S, K, C, D] of `slots` sequences of up to `entries` tokens."""

    def __init__(
        self,
        *,
        layers: int,
        slots: int,
        kv_heads: int,
        entries: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, slots, kv_heads, entries, head_size)
        self.key_LSKCD = torch.zeros(shape, dtype=dtype, device=device)
        self.value_LSKCD = torch.zeros(shape, dtype=dtype, device=device)
        self.slots, self.entries = slots, entries
        self.device = device
        # the decode kernel's counters, 0 between two calls; without the kernel there are none
        self.arrived = (
            torch.zeros(slots * kv_heads, dtype=torch.int32, device=device) if use_triton(device) else None
        )

    @property
    def nbytes(self) -> int:
        return self.key_LSKCD.nbytes + self.value_LSKCD.nbytes

    def copy_(self, source: int, slots: list[int], length: int) -> None:
        """Copy the first `length` entries of one slot to others (a group's prompt). In place."""
        for buffer in (self.key_LSKCD, self.value_LSKCD):
            for slot in slots:
                buffer[:, slot, :, :length] = buffer[:, source, :, :length]

    def prefill(self, slots: list[int]) -> Prefill:
        """The cache to run right-padded prompts with; row i of the batch goes into slots[i]."""
        return Prefill(self, on_device(slots, self.device))

    def extend(self, slot: int, held: int, count: int) -> Extend:
        """The cache to run the next `count` tokens of one sequence with, after the `held` that are there."""
        column_C = torch.arange(held + count, device=self.device)
        row_T = torch.arange(held, held + count, device=self.device)
        return Extend(
            self,
            on_device([slot], self.device),
            slot,
            held,
            (column_C <= row_T[:, None])[None, None],
        )

    def decode(self, entry_S: Tensor, longest: int) -> Decode:
        """The cache to run one token a slot with; `entry_S` is where each slot's token goes.

        Shapes: entry_S [active]. `longest` bounds entry_S + 1 and is known to the host, so nothing
        waits for the device.
        """
        active = len(entry_S)
        live = torch.arange(longest, device=self.device)[None, :] <= entry_S[:, None]
        return Decode(
            self,
            torch.arange(active, device=self.device),
            entry_S,
            longest,
            live[:, None, None, :],
            None if self.arrived is None else Live(entry_S + 1, self.arrived),
        )


@dataclass(frozen=True)
class Prefill:
    """Writes whole prompts into slots; attention sees just the prompts."""

    cache: SlotCache
    slot_B: Tensor

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """key, value [B, K, T, D]. In place on the cache."""
        self.cache.key_LSKCD[layer, self.slot_B, :, : key.shape[2]] = key
        self.cache.value_LSKCD[layer, self.slot_B, :, : key.shape[2]] = value
        return key, value


@dataclass(frozen=True)
class Extend:
    """Appends a chunk of one prompt; attention sees the slot's entries through `mask` [1, 1, T, C]."""

    cache: SlotCache
    slot_B: Tensor
    slot: int
    held: int
    mask: Tensor

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """key, value [1, K, T, D]. In place on the cache; returns views of it."""
        end = self.held + key.shape[2]
        seen = []
        for buffer, new in ((self.cache.key_LSKCD, key), (self.cache.value_LSKCD, value)):
            buffer[layer, self.slot, :, self.held : end] = new[0]
            seen.append(buffer[layer, self.slot : self.slot + 1, :, :end])
        return seen[0], seen[1]


@dataclass(frozen=True)
class Decode:
    """Appends one token a slot; attention sees the slot's entries through `mask` [S, 1, 1, C]."""

    cache: SlotCache
    slot_B: Tensor
    entry_S: Tensor
    longest: int
    mask: Tensor
    live: Live | None

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """key, value [S, K, 1, D]. In place on the cache; returns views of it."""
        for buffer, new in ((self.cache.key_LSKCD, key), (self.cache.value_LSKCD, value)):
            buffer[layer, self.slot_B, :, self.entry_S] = new[:, :, 0]
        return self.entries(layer)

    def entries(self, layer: int) -> tuple[Tensor, Tensor]:
        """Views of keys and values [S, K, C, D] of a layer."""
        seen = slice(len(self.slot_B)), slice(None), slice(self.longest)
        return self.cache.key_LSKCD[layer][seen], self.cache.value_LSKCD[layer][seen]
