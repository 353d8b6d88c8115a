"""Eviction: a slot's cache has `budget + buffer` entries; when full, the best `budget` stay, in place.

Each layer and each KV head keeps its own. A method is one score function over the entries of some
slots, and the name of what it must remember of the queries that have passed:

    method     keeps                                          remembers
    rkv        important and unlike later keys, + window      the last WINDOW queries
    snapkv     important, + window                            the last WINDOW queries
    h2o        most attended to so far, + recent half         each entry's attention, summed over queries
    streaming  the first SINKS, + recent                      nothing

The highest scores stay: +inf is kept in any case, -inf is no entry; of equals the earlier stays. What
stays keeps its order, and its keys their true positions.

Invariants: scores of a slot depend on that slot alone, whatever the lengths beside it; what is gathered
at a time is a layer's entries of a few slots (EVICTION_BLOCK_BYTES), never the pool.

Source: each score function names its own. Differs from the published code of R-KV (Zefan-Cai/R-KV,
rkv/utils.py): slots have lengths of their own; a key with no similar one loses nothing (there its
similarity to entry 0 is dropped); kept entries stay sorted. H2O's sums run over all queries since the
sequence began, of the prompt as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from ..errors import InputError
from .cache import SlotCache
from .transfer import on_device

WINDOW = 8  # queries whose attention is observed, and last entries that stay: Sparse-RL and R-KV
POOL = 7  # neighbouring entries that share their importance: R-KV, appendix; its code's kernel_size
IMPORTANCE = 0.1  # lambda of R-KV eq. 6: the weight of importance against redundancy
SIMILAR = 0.5  # cosine above which two keys say the same
SINKS = 4  # first entries that StreamingLLM keeps
EVICTION_BLOCK_BYTES = 8 << 20  # bounds each of the few temporaries of scoring and gathering
NEVER, ALWAYS = float("-inf"), float("inf")


@dataclass(frozen=True)
class Held:
    """The entries of some slots in one layer, as a score function sees them.

    Shapes: key_SKCD; length_S live entries, the rest of C is garbage; query_SWHD, times the attention's
    scaling, in any order (None unless remembered); attention_SKC, sums of softmax weights (same).
    """

    key_SKCD: Tensor
    length_S: Tensor
    budget: int
    query_SWHD: Tensor | None = None
    attention_SKC: Tensor | None = None

    @property
    def entry_C(self) -> Tensor:
        return torch.arange(self.key_SKCD.shape[2], device=self.key_SKCD.device)

    def last_SC(self, count: int) -> Tensor:
        """True from `count` entries before the end on: dead entries included."""
        return self.entry_C >= (self.length_S - count)[:, None]


# --- scores


def rkv(held: Held) -> Tensor:
    """Z = lambda I - (1 - lambda) R. Source: R-KV, arXiv 2505.24133, eq. 1 to 6."""
    score_SKC = IMPORTANCE * importance(held) - (1 - IMPORTANCE) * redundancy(held)
    return _with_last(score_SKC, held, WINDOW)


def snapkv(held: Held) -> Tensor:
    """I alone. Source: SnapKV, arXiv 2404.14469, sec. 3; R-KV's window and pooling, as used in decoding."""
    return _with_last(importance(held), held, WINDOW)


def h2o(held: Held) -> Tensor:
    """Attention accumulated over all queries. Source: H2O, arXiv 2306.14048, sec. 4 and algorithm 1."""
    assert held.attention_SKC is not None, "H2O needs the attention that has been"
    return _with_last(held.attention_SKC, held, held.budget // 2)


def streaming(held: Held) -> Tensor:
    """The first entries and the last. Source: StreamingLLM, arXiv 2309.17453, sec. 3.2."""
    score_SKC = held.entry_C.float().expand(held.key_SKCD.shape[:3])
    return _with_last(score_SKC.masked_fill(held.entry_C < SINKS, ALWAYS), held, 0)


def importance(held: Held) -> Tensor:
    """I [S, K, C]: attention of the window's queries to what is before the window.

    softmax over entries of the largest logit in the group of query heads, mean over the queries, maximum
    over POOL neighbours. Source: R-KV eq. 1 to 3; its code takes the maximum over heads before the softmax.
    """
    assert held.query_SWHD is not None, "importance is that for the last queries"
    slots, kv_heads, entries, size = held.key_SKCD.shape
    group = held.query_SWHD.shape[2] // kv_heads
    query = held.query_SWHD.float().transpose(1, 2).reshape(slots, kv_heads, group * WINDOW, size)
    logit = query @ held.key_SKCD.float().transpose(2, 3)
    logit_SKWC = logit.view(slots, kv_heads, group, WINDOW, entries).amax(dim=2)
    logit_SKWC.masked_fill_(held.last_SC(WINDOW)[:, None, None], NEVER)
    weight_SKC = torch.softmax(logit_SKWC, dim=-1).mean(dim=2)
    return nn.functional.max_pool1d(weight_SKC, POOL, stride=1, padding=POOL // 2)


def redundancy(held: Held) -> Tensor:
    """R [S, K, C] = softmax over entries of the mean similarity of all keys to each.

    Similarity is the cosine; a key is not similar to itself, and for each key the LAST of those more
    similar to it than SIMILAR is spared. Source: R-KV eq. 4 and 5; by blocks of rows here.
    """
    slots, kv_heads, entries, _ = held.key_SKCD.shape
    unit_SKCD = nn.functional.normalize(held.key_SKCD.float(), dim=-1, eps=1e-8)
    unit_SKCD.masked_fill_(held.last_SC(0)[:, None, :, None], 0.0)  # garbage is similar to nothing
    total_SKC = unit_SKCD.new_zeros(slots, kv_heads, entries)
    index_C = held.entry_C.int()
    rows = max(1, EVICTION_BLOCK_BYTES // (slots * kv_heads * entries * 4))
    for start in range(0, entries, rows):
        stop = min(start + rows, entries)
        cosine_SKRC = unit_SKCD[:, :, start:stop] @ unit_SKCD.transpose(2, 3)
        cosine_SKRC.diagonal(offset=start, dim1=2, dim2=3).zero_()
        last_SKR = torch.where(cosine_SKRC > SIMILAR, index_C, -1).amax(dim=-1)
        cosine_SKRC.masked_fill_(index_C == last_SKR[..., None], 0.0)
        total_SKC += cosine_SKRC.sum(dim=2)
    mean_SKC = total_SKC / held.length_S[:, None, None]
    return torch.softmax(mean_SKC.masked_fill(held.last_SC(0)[:, None], NEVER), dim=-1)


def _with_last(score_SKC: Tensor, held: Held, count: int) -> Tensor:
    """The last `count` live entries always stay, dead ones never."""
    kept_SKC = score_SKC.masked_fill(held.last_SC(count)[:, None], ALWAYS)
    return kept_SKC.masked_fill(held.last_SC(0)[:, None], NEVER)


def kept_entries(score_SKC: Tensor, budget: int) -> Tensor:
    """Ascending indices [S, K, budget] of the highest scores; of equals the earlier."""
    order_SKC = score_SKC.sort(dim=-1, descending=True, stable=True).indices
    return order_SKC[..., :budget].sort(dim=-1).values


# --- memory


class Memory(Protocol):
    """What a method remembers of each slot, beside its entries."""

    @property
    def nbytes(self) -> int:
        """Of all slots."""

    def observe(
        self,
        slot_B: Tensor,
        start_B: Tensor,
        end_B: Tensor,
        layer: int,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> None:
        """Queries [B, H, T, D] at positions [start, end) of each slot's sequence pass. In place, no sync.

        key [B, K, C, D] and mask [B, 1, T, C] are as `decoder.attention` gets them; without a mask query t
        sees the entries up to t. T may be more than end - start: the rest is padding.
        """

    def copy_(self, source: int, slots: list[int]) -> None:
        """Slots begin as `source` is now."""

    def clear_(self, slots: list[int]) -> None:
        """Slots begin with no query seen."""

    def keep_(self, layer: int, slot_S: Tensor, kept_SKB: Tensor) -> None:
        """Only these entries are left."""


class LastQueries:
    """The last WINDOW queries of each slot, scaled; that of position p is at place p modulo WINDOW."""

    def __init__(self, cache: SlotCache, heads: int) -> None:
        layers, slots, _, _, size = cache.key_LSKCD.shape
        self.query_LSWHD = cache.key_LSKCD.new_zeros(layers, slots, WINDOW, heads, size)

    @property
    def nbytes(self) -> int:
        return self.query_LSWHD.nbytes

    def observe(
        self,
        slot_B: Tensor,
        start_B: Tensor,
        end_B: Tensor,
        layer: int,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> None:
        """See Memory. A place whose last query is not among these keeps what it has."""
        place_W = torch.arange(WINDOW, device=query.device)
        last_B1 = end_B[:, None] - 1
        index_BW = last_B1 - (last_B1 - place_W) % WINDOW - start_B[:, None]
        row_B1 = torch.arange(len(query), device=query.device)[:, None]
        new_BWHD = query.transpose(1, 2)[row_B1, index_BW.clamp(min=0)] * scaling
        old_BWHD = self.query_LSWHD[layer, slot_B]
        fresh_BW = (index_BW >= 0)[..., None, None]
        self.query_LSWHD[layer, slot_B] = torch.where(fresh_BW, new_BWHD, old_BWHD)

    def copy_(self, source: int, slots: list[int]) -> None:
        """See Memory."""
        for slot in slots:
            self.query_LSWHD[:, slot] = self.query_LSWHD[:, source]

    def clear_(self, slots: list[int]) -> None:
        """Nothing: a slot is full only after its own queries have taken every place (budget > WINDOW)."""

    def keep_(self, layer: int, slot_S: Tensor, kept_SKB: Tensor) -> None:
        """Nothing: queries are not entries."""


class AttentionSums:
    """Softmax weights of each entry, summed over the queries that have seen it and the heads of its group."""

    def __init__(self, cache: SlotCache, heads: int) -> None:
        layers, slots, kv_heads, entries, _ = cache.key_LSKCD.shape
        shape = (layers, slots, kv_heads, entries)
        self.attention_LSKC = torch.zeros(shape, device=cache.device)

    @property
    def nbytes(self) -> int:
        return self.attention_LSKC.nbytes

    def observe(
        self,
        slot_B: Tensor,
        start_B: Tensor,
        end_B: Tensor,
        layer: int,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> None:
        """See Memory. By blocks of rows and queries."""
        (batch, heads, queries, _), entries = query.shape, key.shape[2]
        many = max(1, EVICTION_BLOCK_BYTES // (heads * entries * 4))  # queries of all heads at a time
        step = min(queries, many)
        for row in range(0, batch, many // step):
            rows = slice(row, row + many // step)
            for start in range(0, queries, step):
                index_T = torch.arange(start, min(start + step, queries), device=query.device)
                if mask is None:
                    seen = torch.arange(entries, device=query.device) <= index_T[:, None]
                else:
                    seen = mask[rows, :, start : start + step]
                real_BT = index_T < (end_B - start_B)[rows, None]
                sum_BKC = _attention_sum(
                    query[rows, :, start : start + step], key[rows], seen, real_BT, scaling
                )
                self.attention_LSKC[layer, slot_B[rows], :, :entries] += sum_BKC

    def copy_(self, source: int, slots: list[int]) -> None:
        """See Memory."""
        for slot in slots:
            self.attention_LSKC[:, slot] = self.attention_LSKC[:, source]

    def clear_(self, slots: list[int]) -> None:
        """See Memory."""
        for slot in slots:
            self.attention_LSKC[:, slot].zero_()

    def keep_(self, layer: int, slot_S: Tensor, kept_SKB: Tensor) -> None:
        """See Memory."""
        sums_SKC = self.attention_LSKC[layer, slot_S]
        budget = kept_SKB.shape[2]
        kept = sums_SKC.gather(2, kept_SKB)
        sums_SKC.zero_()[:, :, :budget] = kept
        self.attention_LSKC[layer, slot_S] = sums_SKC


def _attention_sum(query: Tensor, key: Tensor, seen: Tensor, real_BT: Tensor, scaling: float) -> Tensor:
    """Weights [B, K, C] that entries get from queries [B, H, T, D], summed over T and the group's heads."""
    (batch, heads, queries, size), kv_heads = query.shape, key.shape[1]
    group = heads // kv_heads
    grouped = query.float().reshape(batch, kv_heads, group * queries, size)
    logit = (grouped @ key.float().transpose(2, 3)).mul_(scaling)
    logit_BKGTC = logit.view(batch, kv_heads, group, queries, -1)
    logit_BKGTC.masked_fill_(~seen[..., None, None, :, :] if seen.dim() == 2 else ~seen[:, :, None], NEVER)
    weight_BKGTC = torch.softmax(logit_BKGTC, dim=-1)
    weight_BKGTC.masked_fill_(~real_BT[:, None, None, :, None], 0.0)
    return weight_BKGTC.sum(dim=(2, 3))


# --- methods


@dataclass(frozen=True)
class Method:
    """`least_budget`: with fewer entries nothing would be left to choose."""

    score: Callable[[Held], Tensor]
    memory: type[LastQueries] | type[AttentionSums] | None
    least_budget: int


METHODS = {
    "rkv": Method(rkv, LastQueries, WINDOW + 1),
    "snapkv": Method(snapkv, LastQueries, WINDOW + 1),
    "h2o": Method(h2o, AttentionSums, 2),
    "streaming": Method(streaming, None, SINKS + 1),
}
MethodName = Literal["rkv", "snapkv", "h2o", "streaming"]


@dataclass(frozen=True)
class Eviction:
    """`method` keeps `budget` entries whenever `budget + buffer` are held. Raises InputError."""

    method: MethodName
    budget: int
    buffer: int

    def __post_init__(self) -> None:
        least = METHODS[self.method].least_budget
        if self.budget < least:
            raise InputError(
                f"{self.method} with a budget of {self.budget}: it needs at least {least} entries"
            )
        if self.buffer < 1:
            raise InputError(f"a buffer of {self.buffer} has no room for a token: it needs at least 1 entry")

    @property
    def entries(self) -> int:
        return self.budget + self.buffer

    def memory(self, cache: SlotCache, heads: int) -> Memory | None:
        """A fresh memory of what the method needs to know."""
        kind = METHODS[self.method].memory
        return None if kind is None else kind(cache, heads)

    def compress_(
        self, cache: SlotCache, memory: Memory | None, slots: list[int], lengths: list[int]
    ) -> None:
        """Reduce slots that hold `lengths` entries (each more than budget) to `budget`. In place, no sync."""
        _, _, kv_heads, _, size = cache.key_LSKCD.shape
        longest = max(lengths)
        # of a slot: its keys as they are, twice in float32, and what stays of keys or values
        slot_bytes = kv_heads * longest * size * (8 + 2 * cache.key_LSKCD.element_size())
        step = max(1, EVICTION_BLOCK_BYTES // slot_bytes)
        for start in range(0, len(slots), step):
            slot_S = on_device(slots[start : start + step], cache.device)
            length_S = on_device(lengths[start : start + step], cache.device)
            for layer in range(len(cache.key_LSKCD)):
                kept_SKB = self._choose(cache, memory, layer, slot_S, length_S, longest)
                head_K1 = torch.arange(kv_heads, device=cache.device)[:, None]
                for buffer in (cache.key_LSKCD[layer], cache.value_LSKCD[layer]):
                    buffer[slot_S, :, : self.budget] = buffer[slot_S[:, None, None], head_K1, kept_SKB]
                if memory is not None:
                    memory.keep_(layer, slot_S, kept_SKB)

    def _choose(
        self,
        cache: SlotCache,
        memory: Memory | None,
        layer: int,
        slot_S: Tensor,
        length_S: Tensor,
        longest: int,
    ) -> Tensor:
        """Which entries stay [S, K, budget]."""
        held = Held(
            key_SKCD=cache.key_LSKCD[layer, slot_S, :, :longest],
            length_S=length_S,
            budget=self.budget,
            query_SWHD=memory.query_LSWHD[layer, slot_S] if isinstance(memory, LastQueries) else None,
            attention_SKC=(
                memory.attention_LSKC[layer, slot_S, :, :longest]
                if isinstance(memory, AttentionSums)
                else None
            ),
        )
        return kept_entries(METHODS[self.method].score(held), self.budget)
