"""The engine: continuous batching over slots, on the policy's own weights, zero copies.

A slot holds one sequence. Each turn: `decode` draws one token for every active slot, `look` learns which
sequences have met a stop token or a stop string, `retire` takes these and those that have their length out of
their slots, and `admit` puts waiting requests there. Memory does not depend on how many requests there are.

- The longest prompts come first, equal ones together. A prompt is run once for its whole group: its
  entries are copied to the group's slots, and later to slots that come free, from whichever member
  still has them; the first token of those that wait is drawn at once. Under eviction a prompt that no
  member has whole any more is run again.
- A prompt that is longer than `prefill_tokens` or than the cache is run in chunks.
- Decoding reads and writes device tensors only; what the host must know of a sequence (how many entries
  and tokens) it counts itself. `_step` has static shapes, given (slots, entries seen), and is captured once
  for each (graphs.py). There are few, so some slots may be idle and some entries dead: an idle slot's
  sequence is nobody's, and goes where the next one begins.
- On a GPU the host is `ahead` by a step: what has ended it reads from a copy made before the step that
  is running, so that the device always has its next step. The tokens that are drawn beyond an end meanwhile
  are dropped, and responses are handed out when their copies have come.

Random numbers belong to the request, not to the slot: token t of a request uses uniform t of
Philox(request.key), see sample.py. Slot count, order and looks change nothing but the order of sums.

With an `eviction`, a slot has a fixed count of entries, whatever the length of its sequence: before it is
full it is compressed (eviction.py), and so is a prompt of more entries than the budget. What happens to
a sequence depends on its own length alone.

Law: two log-probabilities travel with a token: of the distribution it was drawn from, and of
softmax(logits / temperature). The learner's, on the same weights, agree with the second up to the order
of sums, unless entries were evicted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..decoder import Decoder
from ..errors import FrugalError, InputError
from ..rollout import Request, Rollout
from .cache import Decode, Extend, Prefill, SlotCache
from .eviction import Eviction
from .graphs import Recorder, Steps, recorder_for, rung
from .layers import fits as fits_kernels
from .layers import token_layers
from .sample import TRUNCATION_BLOCK_BYTES, Drawn, StopText, Truncation, draw
from .transfer import Arriving, on_device

AHEAD = {"cpu": 0, "cuda": 1}  # decode steps that are begun before it is known what the last one ended

Prompt = tuple[int, ...]


@dataclass
class EngineStats:
    """Counts of one `generate` call. Padded prompt tokens and idle slots are not counted."""

    prompt_tokens: int = 0
    decoded_tokens: int = 0
    decode_steps: int = 0
    queue_steps: int = 0  # decode steps while a request waited for a slot,
    queue_tokens: int = 0  # and how many tokens of them are in a response: at most one a slot and step
    graphs: int = 0
    capture_s: float = 0.0
    evictions: int = 0  # times that a slot was compressed
    cache_bytes: int = 0
    memory_bytes: int = 0  # what the eviction method remembers


@dataclass
class Engine:
    """Samples from `decoder`. `prefill_tokens` bounds the padded prompt tokens in a layer at a time.

    `ahead`: decode steps that are begun before it is known what the last one ended; None: what suits the
    device. `recorder`: makes what captures the steps of a call, or None (graphs.py).
    """

    decoder: Decoder
    slots: int
    stop_ids: frozenset[int]
    prefill_tokens: int
    stop_text: StopText | None = None
    eviction: Eviction | None = None
    ahead: int | None = None
    recorder: Callable[[torch.device], Recorder | None] = recorder_for
    stats: EngineStats = field(default_factory=EngineStats)

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        *,
        max_tokens: int,
        temperature: float,
        truncation: Truncation = Truncation(),  # noqa: B008 (frozen)
    ) -> Iterator[tuple[int, Rollout]]:
        """Yields (index of the request, rollout) as sequences end. The pool lives as long as the iterator.

        `max_tokens` bounds each response. Raises InputError where a prompt leaves no room for it in the
        model's positions.
        """
        if not requests:
            return
        longest, limit = max(len(r.prompt_ids) for r in requests), self.decoder.max_tokens
        if longest + max_tokens > limit:
            raise InputError(
                f"a prompt of {longest} tokens and max_tokens = {max_tokens} exceed the {limit} tokens that "
                f"the model sees whole: {room_for(longest, max_tokens, limit)}"
            )
        self.stats = EngineStats()
        with self.decoder.sampling():
            run = _Run(self, requests, max_tokens, temperature, truncation)
            self.stats.cache_bytes = run.cache.nbytes
            self.stats.memory_bytes = run.memory.nbytes if run.memory else 0
            try:
                run.admit()
                while run.sequences or run.leaving:
                    if run.sequences and max_tokens > 1:
                        run.decode()
                        run.look()
                    yield from run.arrived()
                    run.retire()
                    run.admit()
            finally:
                run.steps.close()


def room_for(prompt_tokens: int, max_tokens: int, limit: int) -> str:
    """Which max_tokens, or which prompts, would fit into `limit` tokens."""
    ways = []
    if prompt_tokens < limit:
        ways.append(f"max_tokens of at most {limit - prompt_tokens}")
    if max_tokens < limit:
        ways.append(f"prompts of at most {limit - max_tokens} tokens")
    return " or ".join(ways) + " would do"


@dataclass
class _Sequence:
    """The host's view of an active slot."""

    index: int
    prompt: Prompt
    prompt_entries: int  # in the cache, of the prompt
    held: int  # entries in the cache
    whole: bool = True  # the cache still has the prompt's entries as they were when the response began
    drawn: int = 1  # tokens drawn so far; the last one is not in the cache yet
    read: int = 0  # tokens that the host has looked at for stop strings
    end: int | None = None  # tokens up to the end, where the host knows of one
    queue_drawn: int | None = None  # tokens drawn until no request waited any more


@dataclass
class _Look:
    """What the device will have said of the sequences, when they had drawn so many tokens."""

    sequences: list[tuple[_Sequence, int]]
    arriving: Arriving


@dataclass
class _Leaving:
    """A response on its way to the host."""

    sequence: _Sequence
    drawn: int
    arriving: Arriving


class _Run:
    """Slots, queue and buffers of one `generate` call."""

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        max_tokens: int,
        temperature: float,
        truncation: Truncation,
    ) -> None:
        self.engine, self.decoder = engine, engine.decoder
        self.requests, self.max_tokens = requests, max_tokens
        self.temperature, self.truncation = temperature, truncation
        slots = min(engine.slots, len(requests))
        # equal prompts are neighbours, the longest come first
        first: dict[Prompt, int] = {}
        for index, request in enumerate(requests):
            first.setdefault(request.prompt_ids, index)
        keys = [(-len(r.prompt_ids), first[r.prompt_ids], i) for i, r in enumerate(requests)]
        self.waiting = deque(i for _, _, i in sorted(keys))
        self.begun: dict[int, Drawn] = {}  # the first token of requests that wait for a slot
        self.sequences: list[_Sequence] = []
        self.ended: list[int] = []  # slots whose sequence has been handed out
        config, device = self.decoder.config, self.decoder.device
        longest = max(len(r.prompt_ids) for r in requests) + max_tokens
        self.cache = SlotCache(
            layers=len(self.decoder.layers),
            slots=slots,
            kv_heads=config.num_key_value_heads,
            entries=engine.eviction.entries if engine.eviction else longest,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            dtype=self.decoder.dtype,
            device=device,
        )
        self.memory = (
            engine.eviction.memory(self.cache, config.num_attention_heads) if engine.eviction else None
        )
        self.ahead = AHEAD[device.type] if engine.ahead is None else engine.ahead
        recorder = engine.recorder(device) if self.decoder.steady else None
        self.steps = Steps(self._step, recorder)
        # on a GPU the shapes are the same without graphs, and so are the numbers; a CPU does nothing in vain
        self.few_shapes = recorder is not None or device.type == "cuda"
        self.fused = fits_kernels(self.decoder)
        self.looks: deque[_Look] = deque()
        self.leaving: list[_Leaving] = []
        # whose first tokens are drawn at a time: of few of the logits' many copies
        self.together = max(1, TRUNCATION_BLOCK_BYTES // (4 * config.vocab_size))
        self.last_position = longest - 1
        width = max_tokens
        self.entry_S = torch.zeros(slots, dtype=torch.long, device=device)
        self.position_S = torch.zeros(slots, dtype=torch.long, device=device)
        self.drawn_S = torch.zeros(slots, dtype=torch.long, device=device)
        self.end_S = torch.zeros(slots, dtype=torch.long, device=device)  # tokens up to a stop token
        self.token_ST = torch.zeros(slots, width, dtype=torch.long, device=device)
        self.logprob_ST = torch.zeros(slots, width, device=device)
        self.policy_logprob_ST = torch.zeros(slots, width, device=device)
        self.uniform_ST = torch.zeros(slots, width, device=device)
        self.stop_X = torch.tensor(sorted(engine.stop_ids), dtype=torch.long, device=device)
        self.per_slot = [
            self.entry_S,
            self.position_S,
            self.drawn_S,
            self.end_S,
            self.token_ST,
            self.logprob_ST,
            self.policy_logprob_ST,
            self.uniform_ST,
        ]

    # --- admission

    def admit(self) -> None:
        """Fill free slots from the queue, each with its first token drawn; close those that stay free."""
        places = [*self.ended, *range(len(self.sequences), self.cache.slots)]
        taken = [self.waiting.popleft() for _ in range(min(len(places), len(self.waiting)))]
        # at most one prompt has members both in slots and in the queue: a copy spoils no other's source
        sources = {s.prompt: slot for slot, s in enumerate(self.sequences) if s.whole}
        groups: dict[Prompt, list[int]] = {}
        for index in taken:
            prompt = self.requests[index].prompt_ids
            source = sources.get(prompt) if index in self.begun else None
            slot = places.pop(0)
            if source is None:
                self.begun.pop(index, None)
                self._seat(slot, _Sequence(index, prompt, 0, 0))
                groups.setdefault(prompt, []).append(slot)
                continue
            entries = self.sequences[source].prompt_entries
            if slot != source:
                self.cache.copy_(source, [slot], entries)  # nothing is remembered where there is a source
            self._seat(slot, _Sequence(index, prompt, entries, entries))
            self._begin([slot], self.begun.pop(index))
        prompts = sorted(groups, key=len, reverse=True)
        while prompts:
            count = max(1, self.engine.prefill_tokens // len(prompts[0]))
            if len(prompts[0]) > self.cache.entries:
                count = 1
            logit_BV = self._prefill({p: groups[p][0] for p in prompts[:count]})
            self._first_tokens(logit_BV, prompts[:count], groups)
            prompts = prompts[count:]
        for slot in sorted(set(self.ended) & set(places), reverse=True):
            self._close(slot)
        self.ended = []
        if taken and not self.waiting:
            for sequence in self.sequences:
                sequence.queue_drawn = sequence.drawn

    def _seat(self, slot: int, sequence: _Sequence) -> None:
        """Give a slot to a sequence: the host's view of it, and its random numbers."""
        if slot == len(self.sequences):
            self.sequences.append(sequence)
        else:
            self.sequences[slot] = sequence
        if self.memory is not None:
            self.memory.clear_([slot])
        number_T = torch.from_numpy(self._uniforms(sequence.index, self.max_tokens))
        self.uniform_ST[slot] = on_device(number_T, self.decoder.device)

    def _uniforms(self, index: int, count: int) -> np.ndarray:
        seed = np.random.SeedSequence(self.requests[index].key)
        return np.random.Generator(np.random.Philox(seed)).random(count, dtype=np.float32)

    def _prefill(self, slot_of: dict[Prompt, int]) -> Tensor:
        """Run prompts, the longest first, each into its slot; the logits [B, V] that follow them."""
        prompts, device = list(slot_of), self.decoder.device
        self.engine.stats.prompt_tokens += sum(len(p) for p in prompts)
        width = len(prompts[0])
        if width > min(self.engine.prefill_tokens, self.cache.entries):
            assert len(prompts) == 1, "a prompt that is run in chunks is run alone"
            return self._prefill_in_chunks(prompts[0], slot_of[prompts[0]])
        token_BT = on_device([p + (0,) * (width - len(p)) for p in prompts], device)
        slots = list(slot_of.values())
        cache = self.cache.prefill(slots)
        length_B = on_device([len(p) for p in prompts], device)
        seen = self._seen(cache, torch.zeros_like(length_B), length_B)
        hidden = self._layers(self.decoder.embed(token_BT), None, **seen)
        for slot, prompt in zip(slots, prompts, strict=True):
            self.sequences[slot].held = len(prompt)
        last_BD = hidden[torch.arange(len(prompts), device=device), length_B - 1]
        return self.decoder.logits(self._normed(last_BD))

    def _prefill_in_chunks(self, prompt: Prompt, slot: int) -> Tensor:
        device, sequence = self.decoder.device, self.sequences[slot]
        done = 0
        while done < len(prompt):
            if sequence.held == self.cache.entries:
                self._compress([slot])
            count = min(self.engine.prefill_tokens, self.cache.entries - sequence.held, len(prompt) - done)
            token_BT = on_device([prompt[done : done + count]], device)
            position_BT = torch.arange(done, done + count, device=device)[None]
            cache = self.cache.extend(slot, sequence.held, count)
            seen = self._seen(cache, position_BT[:, 0], position_BT[:, -1] + 1)
            hidden = self._layers(self.decoder.embed(token_BT), position_BT, **seen)
            sequence.held += count
            done += count
        return self.decoder.logits(self._normed(hidden[:, -1]))

    def _first_tokens(self, logit_BV: Tensor, prompts: list[Prompt], groups: dict[Prompt, list[int]]) -> None:
        """Copy these prompts to the other slots of their groups; draw every member's first token."""
        device = self.decoder.device
        slots, rows = [], []
        eviction = self.engine.eviction
        if eviction is not None:
            sources = [groups[prompt][0] for prompt in prompts]
            self._compress([s for s in sources if self.sequences[s].held > eviction.budget])
        for row, prompt in enumerate(prompts):
            source, others = groups[prompt][0], groups[prompt][1:]
            entries = self.sequences[source].held
            self._copy(source, others)
            for sequence in (self.sequences[slot] for slot in groups[prompt]):
                sequence.held = sequence.prompt_entries = entries
                sequence.whole = True
            slots += groups[prompt]
            rows += [row] * len(groups[prompt])
        for start in range(0, len(slots), self.together):
            some = slots[start : start + self.together]
            logit_SV = logit_BV[on_device(rows[start : start + self.together], device)]
            self._begin(some, self._draw(logit_SV, self.uniform_ST[on_device(some, device), 0]))
        if self.memory is not None:
            return  # what is remembered changes with every token: those that wait run their prompt again
        for row, prompt in enumerate(prompts):
            later = list(takewhile(lambda i, p=prompt: self.requests[i].prompt_ids == p, self.waiting))  # type: ignore[misc]
            together = min(self.together, self.cache.slots)
            for start in range(0, len(later), together):
                part = later[start : start + together]
                number_S = torch.from_numpy(np.concatenate([self._uniforms(i, 1) for i in part]))
                drawn = self._draw(logit_BV[row].expand(len(part), -1), on_device(number_S, device))
                self.begun |= {i: Drawn(*(x[k : k + 1] for x in drawn)) for k, i in enumerate(part)}

    def _copy(self, source: int, slots: list[int]) -> None:
        """Slots begin with the entries of another, and what is remembered of them."""
        self.cache.copy_(source, slots, self.sequences[source].held)
        if self.memory is not None:
            self.memory.copy_(source, slots)

    def _begin(self, slots: list[int], drawn: Drawn) -> None:
        """Slots whose sequences have their prompts in the cache get their first tokens. In place."""
        device = self.decoder.device
        slot_S = on_device(slots, device)
        sequences = [self.sequences[slot] for slot in slots]
        self.entry_S[slot_S] = on_device([s.held for s in sequences], device)
        self.position_S[slot_S] = on_device([len(s.prompt) for s in sequences], device)
        self.drawn_S.index_fill_(0, slot_S, 0)
        self.end_S.index_fill_(0, slot_S, self.max_tokens + 1)
        self._note(slot_S, drawn)

    # --- decoding

    def decode(self) -> None:
        """One token for every active slot. No sync, but where a shape is captured."""
        if self.engine.eviction is not None:
            self._compress([i for i, s in enumerate(self.sequences) if s.held == self.cache.entries])
        active, longest = len(self.sequences), 1 + max(s.held for s in self.sequences)
        if self.few_shapes:
            active, longest = rung(active, self.cache.slots), rung(longest, self.cache.entries)
        self.steps(active, min(longest, self.cache.entries))
        stats = self.engine.stats
        for sequence in self.sequences:
            sequence.held = min(sequence.held + 1, self.cache.entries)
            sequence.drawn += 1
        stats.decode_steps += 1
        stats.queue_steps += bool(self.waiting)
        stats.graphs, stats.capture_s = len(self.steps.shapes), self.steps.capture_s

    def _compress(self, slots: list[int]) -> None:
        """Reduce slots to the budget. No sync."""
        eviction = self.engine.eviction
        assert eviction is not None, "without eviction a slot is as large as its sequence"
        if not slots:
            return
        lengths = [self.sequences[slot].held for slot in slots]
        eviction.compress_(self.cache, self.memory, slots, lengths)
        self.entry_S.index_fill_(0, on_device(slots, self.decoder.device), eviction.budget)
        for slot in slots:
            self.sequences[slot].held = eviction.budget
            self.sequences[slot].whole = False
        self.engine.stats.evictions += len(slots)

    def _step(self, slots: int, columns: int) -> None:
        """The device's part, for the first `slots` slots over the first `columns` entries; see graphs.py.

        Idle slots write to their own places; what they hold is within bounds and means nothing.
        """
        slot_S = torch.arange(slots, device=self.decoder.device)
        entry_S, position_S = self.entry_S[:slots], self.position_S[:slots]
        token_S = self.token_ST[slot_S, self.drawn_S[:slots] - 1]
        cache = self.cache.decode(entry_S.clamp(max=columns - 1), columns)
        seen = self._seen(cache, position_S, position_S + 1)
        hidden, position_S1 = self.decoder.embed(token_S[:, None]), position_S[:, None]
        if self.fused:
            normed_SD = token_layers(self.decoder, hidden, position_S1, cache, seen.get("observe"))
        else:
            normed_SD = self._normed(self._layers(hidden, position_S1, **seen)[:, 0])
        # what has ended but is not known to have writes its last entry again and again, as idle slots do
        entry_S.add_(1).clamp_(max=self.cache.entries - 1)
        position_S.add_(1).clamp_(max=self.last_position)
        uniform_S = self.uniform_ST[slot_S, self._place(slot_S)]
        self._note(slot_S, self._draw(self.decoder.logits(normed_SD), uniform_S))

    def _seen(self, cache: Prefill | Extend | Decode, start_B: Tensor, end_B: Tensor) -> dict[str, Any]:
        """What the layers are called with to run positions [start, end) of each slot's sequence."""
        seen: dict[str, Any] = {"past_key_values": cache}
        if not isinstance(cache, Prefill):
            seen["slot_mask"] = cache.mask
            seen["ends_together"] = isinstance(cache, Extend)
        if isinstance(cache, Decode):
            seen["live"] = cache.live
        if self.memory is not None:
            seen["observe"] = partial(self.memory.observe, cache.slot_B, start_B, end_B)
        return seen

    def _layers(self, hidden: Tensor, position_BT: Tensor | None, **extra: object) -> Tensor:
        arguments = self.decoder.arguments(hidden, position_BT)
        for index, caught in enumerate(arguments):
            with self.decoder.layer(index) as layer:
                hidden = layer(hidden, **(caught | extra))
        return hidden

    def _normed(self, hidden_BD: Tensor) -> Tensor:
        with self.decoder.norm() as norm:
            return norm(hidden_BD)

    def _draw(self, logit_SV: Tensor, uniform_S: Tensor) -> Drawn:
        return draw(logit_SV, uniform_S, self.temperature, self.truncation)

    def _place(self, slot_S: Tensor) -> Tensor:
        """Where the next token of each slot is noted."""
        return self.drawn_S[slot_S].clamp(max=self.token_ST.shape[1] - 1)

    def _note(self, slot_S: Tensor, drawn: Drawn) -> None:
        """Append a token to each of these slots. In place."""
        place_S = self._place(slot_S)
        self.token_ST[slot_S, place_S] = drawn.token_S
        self.logprob_ST[slot_S, place_S] = drawn.logprob_S
        self.policy_logprob_ST[slot_S, place_S] = drawn.policy_logprob_S
        self.drawn_S[slot_S] = place_S + 1
        stops_S = (drawn.token_S[:, None] == self.stop_X).any(dim=1)  # torch.isin may sort, and wait
        end_S = torch.where(stops_S, place_S + 1, self.max_tokens + 1)
        self.end_S[slot_S] = torch.minimum(self.end_S[slot_S], end_S)

    # --- retirement

    def look(self) -> None:
        """Learn what has ended, as of `ahead` steps ago. Waits for the device to be there."""
        now = [(sequence, sequence.drawn) for sequence in self.sequences]
        wanted = [self.end_S[: len(now)]]
        if self.engine.stop_text is not None:
            wanted.append(self.token_ST[: len(now)])
        self.looks.append(_Look(now, Arriving(wanted)))
        if len(self.looks) <= self.ahead:
            return
        look = self.looks.popleft()
        end_S, *token = look.arriving.wait()
        for slot, ((sequence, drawn), end) in enumerate(zip(look.sequences, end_S.tolist(), strict=True)):
            if sequence.end is None and end <= drawn:
                sequence.end = end
            if token:
                self._read(sequence, token[0][slot, : min(end, drawn)])

    def _read(self, sequence: _Sequence, token_T: Tensor) -> None:
        """Look for stop strings in the tokens of a response so far: the first one may end it earlier."""
        stop = self.engine.stop_text
        if stop is None or len(token_T) <= sequence.read:
            return
        start = max(0, sequence.read - stop.overlap_tokens)
        end = stop.end(token_T[start:].tolist(), sequence.read - start)
        sequence.read = len(token_T)
        if end is not None:
            sequence.end = start + end if sequence.end is None else min(sequence.end, start + end)

    def retire(self) -> None:
        """Send off the responses that have ended; their slots are `ended`. No sync."""
        for slot, sequence in enumerate(self.sequences):
            if sequence.end is None and sequence.drawn < self.max_tokens:
                continue
            drawn = min(sequence.drawn, self.max_tokens)
            rows = [b[slot, :drawn] for b in (self.token_ST, self.logprob_ST, self.policy_logprob_ST)]
            self.leaving.append(_Leaving(sequence, drawn, Arriving([self.end_S[slot], *rows])))
            self.ended.append(slot)

    def arrived(self) -> Iterator[tuple[int, Rollout]]:
        """Hand out the responses that were sent off in earlier turns."""
        leaving, self.leaving = self.leaving, []
        for one in leaving:
            yield one.sequence.index, self._rollout(one)

    def _rollout(self, leaving: _Leaving) -> Rollout:
        sequence, drawn = leaving.sequence, leaving.drawn
        end_, token_T, logprob_T, policy_logprob_T = leaving.arriving.wait()
        end = int(end_)
        self._read(sequence, token_T[: min(end, drawn)])
        if sequence.end is not None:
            end = min(end, sequence.end)
        length = min(end, drawn)
        rollout = Rollout(
            prompt_ids=sequence.prompt,
            response_ids=token_T[:length].numpy().copy(),
            logprob_T=logprob_T[:length].numpy().copy(),
            truncated=end > drawn,
            policy_logprob_T=policy_logprob_T[:length].numpy().copy(),
        )
        if not (np.isfinite(rollout.logprob_T).all() and np.isfinite(rollout.policy_logprob_T).all()):
            raise FrugalError(
                "the policy's logits are not finite: the weights or the arithmetic have overflowed; "
                "go back to an earlier step, or lower learner.lr"
            )
        stats = self.engine.stats
        stats.decoded_tokens += length
        in_queue = length if sequence.queue_drawn is None else min(length, sequence.queue_drawn)
        stats.queue_tokens += in_queue - 1  # the first comes from the prompt
        return rollout

    def _close(self, slot: int) -> None:
        """Free a slot: the last active one moves into it. In place."""
        last = len(self.sequences) - 1
        if slot != last:
            moved = self.sequences[last]
            self._copy(last, [slot])
            for buffer in self.per_slot:
                buffer[slot] = buffer[last]
            self.sequences[slot] = moved
        self.entry_S[last].zero_()  # idle slots see few entries
        self.sequences.pop()
