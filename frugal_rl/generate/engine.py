"""The engine: continuous batching over slots, on the policy's own weights, zero copies.

A slot holds one sequence. Each turn: `admit` puts waiting requests into free slots (prompts that are
equal are run once and copied), `decode` draws one token for every active slot, `retire` takes out
sequences that met a stop token or their length and closes the gap with the last active slot. Memory
does not depend on how many requests there are.

Random numbers belong to the request, not to the slot: token t of a request uses uniform t of
Philox(request.key), and is the inverse of the cumulative distribution at it. Slot count and order
change nothing but the order of sums.

Law: the log-probability that travels with a token is that of the distribution it was drawn from,
softmax(logits / temperature); at temperature 0 the token is the arg max and its log-probability is
taken at temperature 1. The learner's, on the same weights, agree up to the order of sums.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..decoder import Decoder
from ..errors import FrugalError
from ..rollout import Request, Rollout
from .cache import SlotCache

LOOK_EVERY = {"cpu": 1, "cuda": 8}  # decode steps between two looks at which sequences have ended


@dataclass
class EngineStats:
    """Counts of one `generate` call. Padded prompt tokens and idle slots are not counted."""

    prompt_tokens: int = 0
    decoded_tokens: int = 0
    decode_steps: int = 0
    cache_bytes: int = 0


@dataclass
class Engine:
    """Samples from `decoder`. `prefill_tokens` bounds the padded prompt tokens in a layer at a time."""

    decoder: Decoder
    slots: int
    stop_ids: frozenset[int]
    prefill_tokens: int
    stats: EngineStats = field(default_factory=EngineStats)

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], *, max_tokens: int, temperature: float
    ) -> Iterator[tuple[int, Rollout]]:
        """Yields (index of the request, rollout) as sequences end. The pool lives as long as the iterator.

        `max_tokens` bounds each response. Prompts must leave room in the model's positions.
        """
        if not requests:
            return
        self.stats = EngineStats()
        with self.decoder.sampling():
            run = _Run(self, requests, max_tokens, temperature)
            self.stats.cache_bytes = run.cache.nbytes
            while run.waiting or run.sequences:
                run.admit()
                for _ in range(LOOK_EVERY[self.decoder.device.type]):
                    run.decode()
                yield from run.retire()


@dataclass
class _Sequence:
    """The host's view of an active slot."""

    index: int
    prompt_tokens: int
    drawn: int = 0  # tokens drawn so far


class _Run:
    """Slots, queue and buffers of one `generate` call."""

    def __init__(
        self, engine: Engine, requests: Sequence[Request], max_tokens: int, temperature: float
    ) -> None:
        self.engine, self.decoder = engine, engine.decoder
        self.requests, self.max_tokens, self.temperature = requests, max_tokens, temperature
        slots = min(engine.slots, len(requests))
        # equal prompts stay neighbours, in the order in which they came first
        first: dict[tuple[int, ...], int] = {}
        for index, request in enumerate(requests):
            first.setdefault(request.prompt_ids, index)
        order = sorted(range(len(requests)), key=lambda i: (first[requests[i].prompt_ids], i))
        self.waiting = deque(order)
        self.sequences: list[_Sequence] = []
        config, device = self.decoder.config, self.decoder.device
        heads = config.num_attention_heads
        self.cache = SlotCache(
            layers=len(self.decoder.layers),
            slots=slots,
            kv_heads=config.num_key_value_heads,
            entries=max(len(r.prompt_ids) for r in requests) + max_tokens,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            dtype=self.decoder.dtype,
            device=device,
        )
        look = LOOK_EVERY[device.type]
        self.entry_S = torch.zeros(slots, dtype=torch.long, device=device)
        self.drawn_S = torch.zeros(slots, dtype=torch.long, device=device)
        # a sequence may run on for `look` steps after its end before anyone looks
        self.token_ST = torch.zeros(slots, max_tokens + look, dtype=torch.long, device=device)
        self.logprob_ST = torch.zeros(slots, max_tokens + look, device=device)
        self.uniform_ST = torch.zeros(slots, max_tokens + look, device=device)
        self.stop_X = torch.tensor(sorted(engine.stop_ids), dtype=torch.long, device=device)
        self.end_S = torch.zeros(slots, dtype=torch.long, device=device)  # tokens up to a stop token
        self.per_slot = [
            self.entry_S,
            self.drawn_S,
            self.end_S,
            self.token_ST,
            self.logprob_ST,
            self.uniform_ST,
        ]

    # --- admission

    def admit(self) -> None:
        """Fill free slots from the queue; draws the first token of each."""
        groups: dict[tuple[int, ...], list[int]] = {}
        while self.waiting and len(self.sequences) < self.cache.slots:
            index = self.waiting.popleft()
            request = self.requests[index]
            slot = len(self.sequences)
            self.sequences.append(_Sequence(index, len(request.prompt_ids)))
            groups.setdefault(request.prompt_ids, []).append(slot)
            uniform = np.random.Generator(np.random.Philox(np.random.SeedSequence(request.key))).random(
                self.max_tokens, dtype=np.float32
            )
            self.uniform_ST[slot, : self.max_tokens] = torch.from_numpy(uniform)
        prompts = sorted(groups, key=len, reverse=True)
        while prompts:
            fit = max(1, self.engine.prefill_tokens // len(prompts[0]))
            self._prefill(prompts[:fit], groups)
            prompts = prompts[fit:]

    def _prefill(self, prompts: list[tuple[int, ...]], groups: dict[tuple[int, ...], list[int]]) -> None:
        device, width = self.decoder.device, len(prompts[0])
        token_BT = torch.tensor([p + (0,) * (width - len(p)) for p in prompts], device=device)
        cache = self.cache.prefill([groups[p][0] for p in prompts])
        hidden = self._layers(self.decoder.embed(token_BT), None, past_key_values=cache)
        end_B = torch.tensor([len(p) - 1 for p in prompts], device=device)
        logit_BV = self._logits(hidden[torch.arange(len(prompts), device=device), end_B])
        slots, rows = [], []
        for row, prompt in enumerate(prompts):
            self.cache.copy_(groups[prompt][0], groups[prompt][1:], len(prompt))
            slots += groups[prompt]
            rows += [row] * len(groups[prompt])
            self.engine.stats.prompt_tokens += len(prompt)
        slot_S = torch.tensor(slots, device=device)
        row_S = torch.tensor(rows, device=device)
        self.entry_S[slot_S] = end_B[row_S] + 1
        self.drawn_S[slot_S] = 0
        self.end_S[slot_S] = self.max_tokens + 1
        self._draw(logit_BV[row_S], slot_S)
        for slot in slots:
            self.sequences[slot].drawn = 1

    # --- decoding

    def decode(self) -> None:
        """One token for every active slot."""
        active = len(self.sequences)
        if not active:
            return
        slot_S = torch.arange(active, device=self.decoder.device)
        entry_S = self.entry_S[:active]
        token_S = self.token_ST[slot_S, self.drawn_S[:active] - 1]
        longest = max(s.prompt_tokens + s.drawn for s in self.sequences)
        cache = self.cache.decode(entry_S.clone(), min(longest, self.cache.entries))
        hidden = self._layers(
            self.decoder.embed(token_S[:, None]),
            entry_S[:, None],
            past_key_values=cache,
            slot_mask=cache.mask,
        )
        # a sequence that has ended but was not looked at yet writes its last entry again and again
        entry_S.add_(1).clamp_(max=self.cache.entries - 1)
        self._draw(self._logits(hidden[:, 0]), slot_S)
        for sequence in self.sequences:
            sequence.drawn = min(sequence.drawn + 1, self.token_ST.shape[1])
        self.engine.stats.decode_steps += 1

    def _layers(self, hidden: Tensor, position_BT: Tensor | None, **extra: object) -> Tensor:
        arguments = self.decoder.arguments(hidden, position_BT)
        for index, caught in enumerate(arguments):
            with self.decoder.layer(index) as layer:
                hidden = layer(hidden, **(caught | extra))
        return hidden

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        with self.decoder.norm() as norm:
            return self.decoder.logits(norm(hidden_BD))

    def _draw(self, logit_SV: Tensor, slot_S: Tensor) -> None:
        """Draw a token for each of these slots and note it with its log-probability. No sync."""
        place_S = self.drawn_S[slot_S].clamp(max=self.token_ST.shape[1] - 1)
        if self.temperature == 0:
            logprob_SV = torch.log_softmax(logit_SV, dim=-1)
            token_S = logit_SV.argmax(dim=-1)
        else:
            logprob_SV = torch.log_softmax(logit_SV / self.temperature, dim=-1)
            token_S = _inverse_cdf(logprob_SV, self.uniform_ST[slot_S, place_S])
        self.token_ST[slot_S, place_S] = token_S
        self.logprob_ST[slot_S, place_S] = logprob_SV.gather(1, token_S[:, None])[:, 0]
        self.drawn_S[slot_S] = place_S + 1
        stops_S = torch.isin(token_S, self.stop_X)
        end_S = torch.where(stops_S, place_S + 1, self.max_tokens + 1)
        self.end_S[slot_S] = torch.minimum(self.end_S[slot_S], end_S)

    # --- retirement

    def retire(self) -> Iterator[tuple[int, Rollout]]:
        """Take out what has ended. Syncs with the device."""
        end_S = self.end_S[: len(self.sequences)].tolist()
        ended, out = [], []
        for slot, (sequence, end) in enumerate(zip(self.sequences, end_S, strict=True)):
            if end > min(sequence.drawn, self.max_tokens) and sequence.drawn < self.max_tokens:
                continue
            length = min(end, self.max_tokens)
            rollout = Rollout(
                prompt_ids=self.requests[sequence.index].prompt_ids,
                response_ids=self.token_ST[slot, :length].cpu().numpy().copy(),
                logprob_T=self.logprob_ST[slot, :length].cpu().numpy().copy(),
                truncated=end > self.max_tokens,
            )
            if not np.isfinite(rollout.logprob_T).all():
                raise FrugalError(
                    "the policy's logits are not finite: the weights or the arithmetic have overflowed; "
                    "go back to an earlier step, or lower learner.lr"
                )
            self.engine.stats.decoded_tokens += length
            out.append((sequence.index, rollout))
            ended.append(slot)
        for slot in reversed(ended):
            self._close(slot)
        yield from out

    def _close(self, slot: int) -> None:
        """Free a slot: the last active sequence moves into it."""
        last = len(self.sequences) - 1
        if slot != last:
            moved = self.sequences[last]
            self.cache.copy_(last, [slot], min(moved.prompt_tokens + moved.drawn, self.cache.entries))
            for buffer in self.per_slot:
                buffer[slot] = buffer[last]
            self.sequences[slot] = moved
        self.sequences.pop()


def _inverse_cdf(logprob_SV: Tensor, uniform_S: Tensor) -> Tensor:
    """The token at which the cumulative probability first exceeds uniform * total."""
    cumulative_SV = logprob_SV.exp().cumsum(dim=-1)
    threshold_S = uniform_S * cumulative_SV[:, -1]
    # float32 rounding may lift the product to the total itself: stay below it
    below_S = torch.nextafter(cumulative_SV[:, -1], torch.zeros_like(threshold_S))
    threshold_S = torch.minimum(threshold_S, below_S)
    token_S = torch.searchsorted(cumulative_SV, threshold_S[:, None], right=True)[:, 0]
    return token_S.clamp(max=logprob_SV.shape[1] - 1)  # logits that are not finite find no token
