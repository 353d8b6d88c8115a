"""llama.cpp as the sampler: a GGUF of the policy loaded once, its touched blocks written anew as it learns.

The policy's weights say which entries a step (or a resumed patch) has changed; before the next request is
sampled, the blocks that hold them are encoded from the policy's exact numbers and written in place.

Law: after that, every tensor has the bits that the whole policy would convert to. So it never drifts, however
many steps there were; what is between sampler and learner is the format's rounding (and the cache's, which is
float16), and the correction's business.

- A context lives for one `generate`: its cache takes no memory while the policy learns, and is always fresh.
- Each sequence has a stream of the cache. A prompt is run once for its group and copied to the members'
  streams; where members still wait, also to one spare stream, from which they get it as others end.
- Sequences stand in streams 0, 1, 2, ... without a gap, or a batch would be decoded in several pieces.

Random numbers and log-probabilities are as in engine.py: token t of a request uses uniform t of its key, so
streams and order change nothing but the order of sums.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..decoder import Decoder
from ..errors import FrugalError, InputError
from ..gguf.formats import FORMATS, Format
from ..gguf.layout import EMBEDDING, HEAD, gguf_name, heads_of, row_in_gguf
from ..gguf.write import Values, form_of, write_gguf
from ..memory import LLAMA_BATCH_TOKENS, LLAMA_SLOTS
from ..rollout import Request, Rollout
from ..storage import Changed, Plain
from ..weights import Weights
from .engine import EngineStats, room_for
from .llama_library import Library, LlamaContext, LlamaModel
from .sample import Drawn, StopText, Truncation, draw

BLOCKS = 4096  # encoded at a time: what that takes stays in the processor's cache

Prompt = tuple[int, ...]


class Twin:
    """The policy's weights in llama.cpp, and which of their blocks are not up to date.

    `config`: the model's config.json. Until it is loaded, the GGUF is in the folder for temporary files
    (TMPDIR). Raises InputError for a library or model that it cannot be made of.
    """

    def __init__(
        self, weights: Weights, config: Mapping[str, Any], kind: str, *, on_gpu: bool = False
    ) -> None:
        library = Library.load()
        if on_gpu and not library.llama.llama_supports_gpu_offload():
            on_gpu = False
        self.weights, self.config, self.kind = weights, config, kind
        self.targets = {name: [str(gguf_name(name))] for name in weights.held}
        values = {name: _values(weights, name) for name in weights.held}
        if on_gpu and HEAD not in values:
            # the head lies on the device, the embedding on its host: two tensors, which must both follow
            self.targets[EMBEDDING].append(str(gguf_name(HEAD)))
            values[HEAD] = values[EMBEDDING]
            config = {**config, "tie_word_embeddings": False}
        self._changed: dict[str, list[torch.Tensor]] = {}
        weights.watchers.append(self._note)
        with tempfile.TemporaryDirectory(prefix="frugal_rl-") as folder:
            path = Path(folder) / "policy.gguf"
            write_gguf(path, config, values, kind, name="policy")
            self.model = LlamaModel(library, path, threads=torch.get_num_threads(), on_gpu=on_gpu)

    def _note(self, changed: Mapping[str, Changed]) -> None:
        for name, entries in changed.items():
            self._changed.setdefault(name, []).append(entries.position_N)

    def sync_(self) -> int:
        """Write what has changed; how many blocks. Syncs."""
        written = 0
        batches = {form.name: _Batch(self.model, form) for form in FORMATS.values()}
        for name, parts in self._changed.items():
            shape = tuple(self.weights.held[name].shape)
            form = form_of(shape, self.kind)
            # rows are whole blocks; these are in the checkpoint's order
            own_M = _distinct([part.cpu().numpy() // form.block for part in parts])
            for start in range(0, len(own_M), BLOCKS):
                own_B = own_M[start : start + BLOCKS]
                index_B = self._index(name, shape, form, own_B)
                batches[form.name].add(self.targets[name], index_B, self._values(name, own_B, form))
            written += len(own_M)
        for batch in batches.values():
            batch.write_()
        self._changed = {}
        return written

    def _values(self, name: str, own_B: np.ndarray, form: Format) -> np.ndarray:
        """The policy's numbers, float32 [B, block], of blocks in the checkpoint's order."""
        held = self.weights.held[name]
        index_B = torch.from_numpy(own_B).to(self.weights.device)
        if isinstance(held, Plain):
            value_BX = held.tensor.view(-1, form.block).index_select(0, index_B)
        else:
            place_BX = index_B[:, None] * form.block + torch.arange(form.block, device=index_B.device)
            value_BX = held.at(place_BX.view(-1)).view(-1, form.block)
        return np.asarray(value_BX.float().cpu().numpy())

    def _index(self, name: str, shape: tuple[int, ...], form: Format, own_B: np.ndarray) -> np.ndarray:
        """Where blocks stand in llama.cpp."""
        heads = heads_of(name, self.config)
        if heads is None:
            return own_B
        per_row = max(1, int(np.prod(shape[1:])) // form.block)
        row_B, rest_B = np.divmod(own_B, per_row)
        return row_in_gguf(shape[0], heads)[row_B] * per_row + rest_B

    def tensors(self) -> dict[str, np.ndarray]:
        """Every tensor's blocks as they are in llama.cpp, uint8 [N, block_bytes]; copies."""
        return {
            target: self.model.read(target, form_of(tuple(held.shape), self.kind).block_bytes)
            for name, held in self.weights.held.items()
            for target in self.targets[name]
        }


class _Batch:
    """Blocks of one format that wait to be encoded together: a call for each tensor would take longer."""

    def __init__(self, model: LlamaModel, form: Format) -> None:
        self.model, self.form, self.count = model, form, 0
        self.waiting: list[tuple[list[str], np.ndarray, np.ndarray]] = []

    def add(self, targets: list[str], index_B: np.ndarray, value_BX: np.ndarray) -> None:
        """Of a tensor, or of several that are equal: where blocks stand, and their numbers."""
        self.waiting.append((targets, index_B, value_BX))
        self.count += len(index_B)
        if self.count >= BLOCKS:
            self.write_()

    def write_(self) -> None:
        """Encode and write all of them."""
        if not self.waiting:
            return
        value_NX = np.concatenate([value_BX for _, _, value_BX in self.waiting])
        block_NX = self.model.encode(self.form.code, value_NX, self.form.block_bytes)
        done = 0
        for targets, index_B, _ in self.waiting:
            for target in targets:
                self.model.write_(target, index_B, block_NX[done : done + len(index_B)])
            done += len(index_B)
        self.waiting, self.count = [], 0


def _distinct(parts: list[np.ndarray]) -> np.ndarray:
    """The distinct numbers of arrays that ascend, ascending, int64."""
    if len(parts) > 1:
        return np.unique(np.concatenate(parts)).astype(np.int64)
    number_N = parts[0].astype(np.int64, copy=False)
    first_N = np.empty(len(number_N), bool)
    first_N[:1] = True
    np.not_equal(number_N[1:], number_N[:-1], out=first_N[1:])
    return number_N[first_N]


def _values(weights: Weights, name: str) -> Values:
    held = weights.held[name]

    def rows(which: Any) -> np.ndarray:
        index = torch.from_numpy(which).to(weights.device) if isinstance(which, np.ndarray) else which
        return np.asarray(held.rows(index, torch.float32).cpu().numpy())

    return Values(tuple(held.shape), rows)


@dataclass
class LlamaEngine:
    """Samples as Engine does, from a `twin` of the decoder's policy."""

    decoder: Decoder
    twin: Twin
    slots: int
    stop_ids: frozenset[int]
    stop_text: StopText | None = None
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
        """Yields (index of the request, rollout) as sequences end. Raises as Engine.generate."""
        if not requests:
            return
        longest, limit = max(len(r.prompt_ids) for r in requests), self.decoder.max_tokens
        if longest + max_tokens > limit:
            raise InputError(
                f"a prompt of {longest} tokens and max_tokens = {max_tokens} exceed the {limit} tokens that "
                f"the model sees whole: {room_for(longest, max_tokens, limit)}"
            )
        self.stats = EngineStats()
        self.twin.sync_()
        if self.decoder.device.type == "cuda":  # what learning has freed is PyTorch's still
            torch.cuda.empty_cache()
        slots = min(self.slots, len(requests), LLAMA_SLOTS)
        with self.twin.model.context(
            sequences=slots + 1,
            cells=longest + max_tokens,
            batch_tokens=max(LLAMA_BATCH_TOKENS, slots + 1),
        ) as context:
            run = _Run(self, context, requests, slots, max_tokens, temperature, truncation)
            run.admit()
            while run.active:
                yield from run.retire()
                if run.ended:  # and what enters may end with its first token
                    run.admit()
                else:
                    run.decode()


@dataclass
class _Sequence:
    """A request in a stream."""

    index: int
    prompt: Prompt
    uniform_T: np.ndarray
    token: list[int] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)
    policy_logprob: list[float] = field(default_factory=list)
    read: int = 0  # tokens in which stop strings were looked for


@dataclass(frozen=True)
class _Kept:
    """The prompt in the spare stream, and the logits [V] that follow it."""

    prompt: Prompt
    logit_V: torch.Tensor


class _Run:
    """Streams, queue and context of one `generate` call."""

    def __init__(
        self,
        engine: LlamaEngine,
        context: LlamaContext,
        requests: Sequence[Request],
        slots: int,
        max_tokens: int,
        temperature: float,
        truncation: Truncation,
    ) -> None:
        self.engine, self.context, self.requests = engine, context, requests
        self.slots, self.spare, self.max_tokens = slots, slots, max_tokens
        self.draw: Callable[[torch.Tensor, torch.Tensor], Drawn] = lambda logit_SV, uniform_S: draw(
            logit_SV, uniform_S, temperature, truncation
        )
        self.batch_tokens = max(LLAMA_BATCH_TOKENS, slots + 1)
        # equal prompts are neighbours, the longest come first
        first: dict[Prompt, int] = {}
        for index, request in enumerate(requests):
            first.setdefault(request.prompt_ids, index)
        keys = [(-len(r.prompt_ids), first[r.prompt_ids], i) for i, r in enumerate(requests)]
        self.waiting = deque(i for _, _, i in sorted(keys))
        self.active: list[_Sequence] = []  # by stream
        self.ended: list[int] = []
        self.kept: _Kept | None = None

    # --- admission

    def admit(self) -> None:
        """Fill free streams from the queue, each with its first token drawn; close those that stay free."""
        places = [*self.ended, *range(len(self.active), self.slots)]
        groups: dict[Prompt, list[int]] = {}
        while places and self.waiting:
            index, stream = self.waiting.popleft(), places.pop(0)
            request = self.requests[index]
            seed = np.random.SeedSequence(request.key)
            uniform_T = np.random.Generator(np.random.Philox(seed)).random(self.max_tokens, dtype=np.float32)
            sequence = _Sequence(index, request.prompt_ids, uniform_T)
            if stream == len(self.active):
                self.active.append(sequence)
            else:
                self.active[stream] = sequence
            groups.setdefault(request.prompt_ids, []).append(stream)
        for prompt, streams in list(groups.items()):
            if self.kept is not None and self.kept.prompt == prompt:
                for stream in streams:
                    self.context.copy_(self.spare, stream)
                self._begin(streams, self.kept.logit_V.expand(len(streams), -1))
                del groups[prompt]
        prompts = list(groups)
        while prompts:
            count, tokens = 1, len(prompts[0])
            while count < len(prompts) and tokens + len(prompts[count]) <= self.batch_tokens:
                tokens += len(prompts[count])
                count += 1
            self._prefill({prompt: groups[prompt] for prompt in prompts[:count]})
            prompts = prompts[count:]
        for stream in sorted(set(self.ended) & set(places), reverse=True):
            self._close(stream)
        self.ended = []

    def _prefill(self, groups: dict[Prompt, list[int]]) -> None:
        """Run prompts that fit into a batch together, or one in several batches, each for its whole group."""
        self.engine.stats.prompt_tokens += sum(map(len, groups))
        for streams in groups.values():
            self.context.clear_(streams[0])
        token_N = np.concatenate([np.asarray(prompt) for prompt in groups])
        position_N = np.concatenate([np.arange(len(prompt)) for prompt in groups])
        stream_N = np.repeat([streams[0] for streams in groups.values()], [len(prompt) for prompt in groups])
        wanted_N = np.concatenate([np.arange(len(prompt)) == len(prompt) - 1 for prompt in groups])
        for start in range(0, len(token_N), self.batch_tokens):
            here = slice(start, start + self.batch_tokens)
            logits = self.context.decode(token_N[here], position_N[here], stream_N[here], wanted_N[here])
        logit_PV = torch.from_numpy(logits)
        for row, (prompt, streams) in enumerate(groups.items()):
            for stream in streams[1:]:
                self.context.copy_(streams[0], stream)
            if self.waiting and self.requests[self.waiting[0]].prompt_ids == prompt:
                self.context.copy_(streams[0], self.spare)
                self.kept = _Kept(prompt, logit_PV[row].clone())
        rows = [row for row, streams in enumerate(groups.values()) for _ in streams]
        self._begin([stream for streams in groups.values() for stream in streams], logit_PV[rows])

    def _begin(self, streams: list[int], logit_SV: torch.Tensor) -> None:
        self._note([self.active[stream] for stream in streams], logit_SV)

    def _close(self, stream: int) -> None:
        """Free a stream: the last one moves into it."""
        last = len(self.active) - 1
        if stream != last:
            self.context.copy_(last, stream)
            self.active[stream] = self.active[last]
        self.context.clear_(last)
        self.active.pop()

    # --- decoding

    def decode(self) -> None:
        """One token for every active stream."""
        token_S = np.asarray([s.token[-1] for s in self.active])
        position_S = np.asarray([len(s.prompt) + len(s.token) - 1 for s in self.active])
        stream_S = np.arange(len(self.active))
        logits = self.context.decode(token_S, position_S, stream_S, np.ones(len(self.active), bool))
        self._note(self.active, torch.from_numpy(logits))
        self.engine.stats.decode_steps += 1

    def _note(self, sequences: list[_Sequence], logit_SV: torch.Tensor) -> None:
        """Draw a token for each and append it."""
        uniform_S = torch.from_numpy(np.asarray([s.uniform_T[len(s.token)] for s in sequences]))
        drawn = self.draw(logit_SV, uniform_S)
        for sequence, token, logprob, policy in zip(
            sequences, *(column.tolist() for column in drawn), strict=True
        ):
            sequence.token.append(token)
            sequence.logprob.append(logprob)
            sequence.policy_logprob.append(policy)

    # --- retirement

    def retire(self) -> Iterator[tuple[int, Rollout]]:
        """Hand out what has ended; its streams are `ended`."""
        out = []
        for stream, sequence in enumerate(self.active):
            end = self._end(sequence)
            if end is None and len(sequence.token) < self.max_tokens:
                continue
            out.append((sequence.index, self._rollout(sequence, truncated=end is None)))
            self.ended.append(stream)
        yield from out

    def _end(self, sequence: _Sequence) -> int | None:
        """How many tokens it took to end, by a stop token or string; None: it has not."""
        if sequence.token[-1] in self.engine.stop_ids:
            return len(sequence.token)
        stop = self.engine.stop_text
        if stop is None:
            return None
        start = max(0, sequence.read - stop.overlap_tokens)
        end = stop.end(sequence.token[start:], sequence.read - start)
        sequence.read = len(sequence.token)
        return None if end is None else start + end

    def _rollout(self, sequence: _Sequence, *, truncated: bool) -> Rollout:
        rollout = Rollout(
            prompt_ids=sequence.prompt,
            response_ids=np.asarray(sequence.token, np.int64),
            logprob_T=np.asarray(sequence.logprob, np.float32),
            truncated=truncated,
            policy_logprob_T=np.asarray(sequence.policy_logprob, np.float32),
        )
        if not (np.isfinite(rollout.logprob_T).all() and np.isfinite(rollout.policy_logprob_T).all()):
            raise FrugalError(
                "the policy's logits are not finite: the weights or the arithmetic have overflowed; "
                "go back to an earlier step, or lower learner.lr"
            )
        self.engine.stats.decoded_tokens += len(sequence.token)
        return rollout
