"""One memory budget, divided before the model is loaded, and what was really used.

The phases take turns on one device: the KV pool exists only while generating, boundary states and
gradients only while learning. So the budget must hold the larger of

    generating: weights + slots * (KV entries + logits) + prefill
    learning:   weights + boundary states + (a layer's gradient + a micro-batch's activations, or the head)

(in both, a layer's copy where the weights are not stored in the format that is computed in), and what
is left over the fixed parts decides `slots` and `micro_tokens`, the two numbers that nobody should have
to choose. Everything is computed from the model's config and the lengths. No torch.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from .arms import RANK, extra_bytes
from .console import size
from .errors import InputError
from .rollout import SHARED_TOKENS

FLOAT32_BYTES = 4
M_MMAP_THRESHOLD = -3  # mallopt's name for it
# of all entries, those that a step or the patch holds: 2.5 times the 0.16 % measured after ten steps of a 7B
# model (a replication of arXiv 2602.07729); small or random models change more
CHANGED_SHARE = 0.004
PATCH_BYTES = 10  # an entry of the patch: its position and the base's bits
WAITING_BYTES = 10  # an entry that waits for the commit: its position, gradient and bits
TRAVELLING = 4  # a micro-batch's states on their way to or from the host (transit.py)
PAGE_LOCKED_FACTOR = 2  # torch rounds page-locked blocks up to powers of two: less than twice the bytes
HEAD_BLOCK_BYTES = 32 << 20  # of the head's rows, and of logits, in the compute format (decoder.py)
PROPOSED, PROPOSED_BYTES = 4 << 20, 20  # entries of a proposal, and of its few copies of each (weights.py)
RESIDENT_BYTES = 64 << 20  # copies of all layers may stay while sampling, up to this (decoder.py)
WINDOW_QUERIES = 8  # that rkv and snapkv remember of each slot (generate/eviction.py)
GRAPH_BYTES = 32 << 20  # cuBLAS' workspace of the stream that decode steps are captured on, at most
PACKED_BYTES = 5  # an entry of an int8 matrix's patch as the sampler's kernel reads it (kernels/matmul.py)
EVICTION_BYTES = 4 * (8 << 20)  # its temporaries, each of at most a block (generate/eviction.py)
# llama.cpp as the sampler: bytes of an entry by its format, tokens of a batch, sequences at a time (256 is
# its limit, one stream is spare); its cache is float16, for each sequence a multiple of so many entries
LLAMA_ENTRY_BYTES = {"q8_0": 34 / 32, "bf16": 2.0, "f16": 2.0}
LLAMA_BATCH_TOKENS = 256
LLAMA_SLOTS = 255
LLAMA_CACHE_BYTES, LLAMA_CELLS = 2, 256
# the most tokens that go through a layer together: on a GPU its products gain nothing beyond; on a CPU the
# activations stay in the cache (the embedded model learns 1.6 times as fast as with 4096)
MOST_MICRO_TOKENS = {"device": 8192, "host": 1024}


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, as its config.json gives them. `head_norms`: queries and keys are normed."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    head_norms: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shape:
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
            head_norms=config.get("model_type") == "qwen3",
        )

    @property
    def layer_parameters(self) -> int:
        """Matrices of one layer; norms and biases are noise."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def rows(self) -> int:
        """Rows of all matrices: each has a scale where weights are held in int8."""
        layer = (self.heads + 2 * self.kv_heads) * self.head_size + 2 * self.hidden + 2 * self.intermediate
        return self.layers * layer + self.vocabulary * (1 if self.tied else 2)

    @property
    def linear_ends(self) -> int:
        """In and out features of all matrices of the layers: entries of adapters of rank 1."""
        heads = self.heads * self.head_size
        attention = 2 * (self.hidden + heads) + 2 * (self.hidden + self.kv_heads * self.head_size)
        return self.layers * (attention + 3 * (self.hidden + self.intermediate))

    @property
    def parameters(self) -> int:
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + embeddings


@dataclass(frozen=True)
class Form:
    """A way to hold the weights (DESIGN.md 2): bytes of a matrix entry and of a matrix row.

    `entry_bytes` None: as the checkpoint stores it. `host`: the checkpoint's entries are in host memory too.
    """

    entry_bytes: int | None
    row_bytes: int
    host: bool
    patch_bytes: int = PATCH_BYTES


FORMS = {
    "bf16": Form(entry_bytes=None, row_bytes=0, host=False),
    "int8": Form(entry_bytes=1, row_bytes=FLOAT32_BYTES, host=False),
    "host": Form(entry_bytes=1, row_bytes=FLOAT32_BYTES, host=True, patch_bytes=PATCH_BYTES + 2),
}


@dataclass(frozen=True)
class Work:
    """What a step has to hold: rollouts, their longest lengths, and the formats it computes in.

    `storage_bytes`, `compute_bytes`: of an entry. `has_host`: the device has a host with memory of its
    own, so that boundary states may go there; `host_room_bytes` of it may be used (None: not known).
    `reference`: another model that scores the rollouts, streamed from the host. `kv_entries`: of a slot,
    where `eviction` holds it to so many. `gguf`: the format of llama.cpp's copy of the weights, where it
    is the sampler.

    `optimizer_bytes` are held in both phases, and `gradient_bytes` while learning, by what is not plain SGD.
    `frozen`: the weights get no gradient, adapters do.

    What is streamed comes from the system's page cache, which is not counted where it has no memory apart.
    """

    sequences: int
    prompt_tokens: int
    response_tokens: int
    storage_bytes: int
    compute_bytes: int
    has_host: bool
    form: str = "bf16"
    host_room_bytes: int | None = None
    reference: Shape | None = None
    kv_entries: int | None = None
    eviction: str | None = None
    gguf: str | None = None
    optimizer_bytes: int = 0
    gradient_bytes: int = 0
    frozen: bool = False

    @property
    def longest(self) -> int:
        return self.prompt_tokens + self.response_tokens


@dataclass(frozen=True)
class Plan:
    """How the budget is divided. `boundary_on_host`: whether states at layer boundaries leave the device.

    `boundary_every`: they are kept for every so many layers. `layers_together`: so many go backward in one
    graph; states at the boundaries between are computed anew.
    `generating`, `learning`: bytes on the device by part; `host`: bytes in the memory of its host.
    `least_bytes`: the smallest budget that this work fits in.
    """

    slots: int
    micro_tokens: int
    boundary_on_host: bool
    boundary_every: int
    layers_together: int
    budget_bytes: int
    least_bytes: int
    generating: Mapping[str, int]
    learning: Mapping[str, int]
    host: Mapping[str, int]

    @property
    def fits(self) -> bool:
        return self.least_bytes <= self.budget_bytes

    @property
    def generating_bytes(self) -> int:
        return sum(self.generating.values())

    @property
    def learning_bytes(self) -> int:
        return sum(self.learning.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def peak_bytes(self) -> int:
        """Of the larger phase."""
        return max(self.generating_bytes, self.learning_bytes)

    def as_json(self) -> dict[str, Any]:
        """Every field and sum."""
        sums = ("fits", "generating_bytes", "learning_bytes", "host_bytes", "peak_bytes")
        return {**asdict(self), **{name: getattr(self, name) for name in sums}}


def with_learner(work: Work, shape: Shape, kind: str, rank: int | None) -> Work:
    """And what a learner.kind holds besides the weights."""
    adapters = shape.linear_ends * (rank or RANK)
    held, learning = extra_bytes(kind, shape.parameters, work.storage_bytes, adapters)
    return replace(work, optimizer_bytes=held, gradient_bytes=learning, frozen=kind == "lora")


def plan(shape: Shape, work: Work, budget_bytes: int) -> Plan:
    """Choose slots and micro-batch tokens. Raises InputError when it does not fit, saying what would."""
    divided = lay_out(shape, work, budget_bytes)
    if not divided.fits:
        raise InputError(
            f"{count(shape.parameters)} parameters with {work.sequences} sequences of up to "
            f"{work.longest} tokens need {gib_up(divided.least_bytes):.1f} GiB, the budget is "
            f"{budget_bytes / 2**30:.1f} GiB: {what_would(shape, work, budget_bytes)}, or raise memory.budget"
        )
    return divided


def lay_out(shape: Shape, work: Work, budget_bytes: int) -> Plan:
    """The plan, whether it fits or not: then with one slot and one sequence a micro-batch."""
    ways = _ways(shape, work)
    needs = [_divide(shape, work, 0, way).peak_bytes for way in ways]
    least_bytes = min(needs)
    fitting = (way for way, need in zip(ways, needs, strict=True) if need <= budget_bytes)
    way = next(fitting, ways[needs.index(least_bytes)])
    return replace(_divide(shape, work, budget_bytes, way), least_bytes=least_bytes)


def _divide(shape: Shape, work: Work, budget_bytes: int, way: _Way) -> Plan:
    """The plan that goes one way; with a budget of 0 the smallest there is. `least_bytes` is left 0."""
    form, compute, together = FORMS[work.form], work.compute_bytes, way.together
    entry = work.storage_bytes if form.entry_bytes is None else form.entry_bytes
    weights = shape.parameters * entry + shape.rows * form.row_bytes
    layer = shape.layer_parameters * compute
    copied = entry != compute
    plain = not work.optimizer_bytes
    changed = int(shape.parameters * CHANGED_SHARE) if plain else 0
    whole = shape.layers * layer
    token = _activation_bytes(shape, compute)
    responses = work.sequences * work.response_tokens
    held = work.longest if work.kv_entries is None else work.kv_entries
    entries = 2 * shape.layers * shape.kv_heads * shape.head_size * held * compute
    remembered = _remembered_bytes(shape, work.eviction, held, compute)
    logits = 3 * FLOAT32_BYTES * shape.vocabulary  # logits, their softmax and its sum
    # on a GPU what a step needs stays in the graphs' pool (generate/graphs.py), while prompts run too
    captured = token if work.has_host and work.gguf is None else 0
    slot = entries + remembered + logits + captured
    packed = PACKED_BYTES if copied and work.has_host and work.gguf is None else 0
    generating = {
        "weights": weights,
        "layer copies": max(whole if whole <= RESIDENT_BYTES else 0, layer * together) if copied else 0,
        "patch": changed * (form.patch_bytes + packed),
        "prefill": work.longest * token,  # one prompt at a time at least
        **({"eviction": EVICTION_BYTES} if work.eviction else {}),
        **({"decode graphs": GRAPH_BYTES} if captured else {}),
    }
    copy = {}
    if work.gguf is not None:  # llama.cpp computes: the engine's layer copies and prefill are not there
        entries, slot = _llama_stream_bytes(shape, held)
        copy = {"llama.cpp's weights": int(shape.parameters * LLAMA_ENTRY_BYTES[work.gguf])}
        batch = {"layer copies": 0, "prefill": _llama_batch_bytes(shape), "llama.cpp's spare stream": entries}
        generating |= {**batch, **copy}
    learning = {
        "weights": weights,
        **copy,
        "layer copies": _streamed_bytes(shape, work.storage_bytes, compute)
        if form.host
        else layer * together * copied,
        "patch": changed * form.patch_bytes,
        "step's changes": changed * WAITING_BYTES,
        # the head's gradient of the rows that occur, which waits for the embedding's
        "tied rows": min(shape.vocabulary, work.sequences * work.longest) * shape.hidden * FLOAT32_BYTES
        if shape.tied and not work.frozen
        else 0,
    }
    # in turns: the head, and a run of layers after the other
    # the states that predict a response token, normed, and their gradient, which below float32 takes their
    # place; once more on a CPU, where that agrees with the resident memory that was measured
    # a block of rows, their gradient, and what of it is proposed
    rows = min(HEAD_BLOCK_BYTES // compute, shape.vocabulary * shape.hidden)  # entries of them
    logit = min(HEAD_BLOCK_BYTES // compute, responses * shape.vocabulary)
    learned = 0 if work.frozen else FLOAT32_BYTES * rows + PROPOSED_BYTES * min(rows, PROPOSED) * plain
    block = compute * rows + FLOAT32_BYTES * logit + learned
    state = compute + FLOAT32_BYTES + compute * (not work.has_host)
    head = responses * shape.hidden * state + block
    # the sums of a run's layers (of all, where an optimizer wants them), and the matrix that is being added:
    # below float32, products go into the sums as they are
    added = shape.hidden * shape.intermediate * (compute >= FLOAT32_BYTES)
    sums = shape.layer_parameters * together * plain + added
    gradients = 0 if work.frozen else sums * FLOAT32_BYTES
    if work.reference is not None:
        # it scores before the step begins: what its layers need beyond what the step has for its own
        theirs = _streamed_bytes(work.reference, work.storage_bytes, compute)
        own = learning["layer copies"] + learning["step's changes"] + gradients
        learning["reference's layers"] = max(0, theirs - own)
    if work.optimizer_bytes:
        generating["optimizer"] = learning["optimizer"] = work.optimizer_bytes
        learning["gradients"] = work.gradient_bytes
    fixed = sum(learning.values())
    room = budget_bytes - sum(generating.values())
    slots = max(1, min(work.sequences, room // slot))
    if work.gguf is not None:
        slots = min(slots, LLAMA_SLOTS)
    most = MOST_MICRO_TOKENS["device" if work.has_host else "host"]
    # a row of several responses has a mask over all its pairs, as bits, and in each layer as numbers
    mask = min(SHARED_TOKENS, most, work.sequences * work.longest) * (1 + compute * together)
    graph = _graph_bytes(shape, compute, together) if work.has_host else token * together
    learned_token = graph + mask + TRAVELLING * way.on_host * shape.hidden * compute
    fitting = (budget_bytes - fixed - gradients - way.device_bytes) // learned_token
    micro = max(work.longest, min(fitting, most, work.sequences * work.longest))
    if work.eviction:
        generating["eviction"] += slots * remembered
    if captured:
        generating["decode graphs"] += slots * captured
    return Plan(
        slots=slots,
        micro_tokens=micro,
        boundary_on_host=way.on_host,
        boundary_every=way.every,
        layers_together=together,
        budget_bytes=budget_bytes,
        least_bytes=0,
        generating={
            **generating,
            "KV pool": slots * entries,
            "logits": slots * (slot - entries - remembered - captured),
        },
        learning={
            **learning,
            "boundary states": way.device_bytes,
            "gradient scratch": gradients,
            "micro-batch": micro * learned_token,
            "head, beyond these two": max(0, head - gradients - micro * learned_token),
        },
        host={
            "boundary states": way.host_bytes,
            **_streamed_from(shape, work),
        },
    )


def _llama_stream_bytes(shape: Shape, longest: int) -> tuple[int, int]:
    """A stream of llama.cpp's cache, and that with what else a sequence needs."""
    cells = -(-longest // LLAMA_CELLS) * LLAMA_CELLS
    stream = 2 * shape.layers * shape.kv_heads * shape.head_size * cells * LLAMA_CACHE_BYTES
    logits = 4 * FLOAT32_BYTES * shape.vocabulary  # its own, and what drawing a token takes
    return stream, stream + logits


def _llama_batch_bytes(shape: Shape) -> int:
    """What llama.cpp's graph holds of a batch at a time: its widest states, and logits."""
    states = 4 * shape.hidden + 3 * shape.intermediate + 2 * shape.heads * shape.head_size
    return LLAMA_BATCH_TOKENS * FLOAT32_BYTES * (states + shape.vocabulary)


def _streamed_bytes(shape: Shape, storage_bytes: int, compute_bytes: int) -> int:
    """Of streamed layers on the device: one in use, one on its way, and a copy in the compute format."""
    copied = compute_bytes != storage_bytes
    return shape.layer_parameters * (2 * storage_bytes + compute_bytes * copied)


def _streamed_from(shape: Shape, work: Work) -> dict[str, int]:
    """Checkpoints that stay in the memory of the host."""
    return {
        "weights": shape.parameters * work.storage_bytes if FORMS[work.form].host else 0,
        "reference": work.reference.parameters * work.storage_bytes if work.reference is not None else 0,
    }


def live_states(layers: int, every: int, together: int = 1) -> int:
    """The most hidden states of the whole batch that are alive in a step (learn.py), the gradient included.

    When the backward pass begins a group of layers: the kept ones of the groups below and its own, those at
    the starts of its other runs, and the gradient that travels down. The last group may have fewer layers.
    """
    every = min(every, layers)
    groups = -(-layers // every)
    last = layers - (groups - 1) * every
    return max(groups + -(-last // together), groups - 1 + -(-every // together))


@dataclass(frozen=True)
class _Way:
    """How boundary states are kept and layers go backward, and the bytes that the states take."""

    on_host: bool
    every: int
    together: int
    device_bytes: int
    host_bytes: int


def _ways(shape: Shape, work: Work) -> list[_Way]:
    """The ways there are, in the order in which they are wanted.

    All states: on the device, on its host (copies cost less time than the small micro-batches of a full
    device). Every k-th, k layers going backward together: there, on the device. Every k-th, the others
    computed anew: there, on the device; none with a larger k than the best of these needs fewer states.
    Streamed layers go backward one at a time.
    """
    state = work.sequences * work.longest * shape.hidden * work.compute_bytes
    room = work.host_room_bytes
    if room is not None:
        room -= sum(_streamed_from(shape, work).values())

    def ways(on_host: bool, every: int, together: int) -> Iterator[_Way]:
        states = live_states(shape.layers, every, together) * state
        locked = states * PAGE_LOCKED_FACTOR
        if not on_host:
            yield _Way(False, every, together, states, 0)
        elif work.has_host and (room is None or locked <= room):
            yield _Way(True, every, together, 0, locked)

    best = min(range(1, shape.layers + 1), key=lambda every: live_states(shape.layers, every))
    several = range(2, best + 1)
    joint = [(every, every) for every in several if not FORMS[work.form].host]
    anew = [(every, 1) for every in several]
    wanted = [(False, [(1, 1)]), (True, [(1, 1), *joint]), (False, joint), (True, anew), (False, anew)]
    return [way for on_host, pairs in wanted for pair in pairs for way in ways(on_host, *pair)]


def what_would(shape: Shape, work: Work, budget_bytes: int) -> str:
    """What fits in the budget instead: fewer sequences, or shorter responses; else what to take."""

    def most(field: str) -> int:
        """The largest value of a field, below the present one, with which it fits; 0 if none does."""
        low, high = 0, getattr(work, field)
        while high - low > 1:
            middle = (low + high) // 2
            fits = lay_out(shape, replace(work, **{field: middle}), budget_bytes).fits
            low, high = (middle, high) if fits else (low, middle)
        return low

    sequences, tokens = most("sequences"), most("response_tokens")
    ways = [f"{sequences} sequences of {work.longest} tokens"] if sequences else []
    ways += [f"{work.sequences} sequences with max_tokens = {tokens}"] if tokens else []
    if not ways:
        return "not even one short sequence fits, take a smaller model"
    return " or ".join(ways) + " would fit (fewer prompts or samples, or a lower max_tokens)"


def gib_up(count_bytes: int) -> float:
    """GiB rounded up to a tenth, so that a budget of so much does fit."""
    return math.ceil(count_bytes / 2**30 * 10) / 10


def count(entries: int) -> str:
    """Parameters, short: 7.62 G or 0.8 M."""
    return f"{entries / 1e9:.2f} G" if entries >= 1e8 else f"{entries / 1e6:.1f} M"


def _remembered_bytes(shape: Shape, eviction: str | None, entries: int, compute_bytes: int) -> int:
    """What an eviction method remembers of a slot besides its entries."""
    if eviction in ("rkv", "snapkv"):
        return shape.layers * WINDOW_QUERIES * shape.heads * shape.head_size * compute_bytes
    return shape.layers * shape.kv_heads * entries * FLOAT32_BYTES if eviction == "h2o" else 0


def _activation_bytes(shape: Shape, compute_bytes: int) -> int:
    """What autograd keeps for one token of one layer, and two gradients at the widest place, the MLP.

    Norms are computed in float32: below it, each keeps its input and result in float32 too.
    """
    attention = (4 * shape.heads + 3 * shape.kv_heads) * shape.head_size
    norms = 0 if compute_bytes >= FLOAT32_BYTES else 4 * shape.hidden * FLOAT32_BYTES
    return (5 * shape.hidden + attention + 6 * shape.intermediate) * compute_bytes + norms


def _graph_bytes(shape: Shape, compute_bytes: int, together: int) -> int:
    """On a GPU: what autograd keeps for one token of so many layers, and the gradients at the widest place.

    A layer keeps: of each norm its input in float32, and the normed state before and after its weight; of
    attention queries, output, and keys and values for every head (under a mask; flash attention keeps fewer);
    of the MLP both projections, the gate and their product. Beside the last layer's: its output, and two
    gradients of the width of the MLP. Within half a percent of what tests/test_emulated.py counts: the roots
    of the norms and attention's sums, 4 bytes a head, are left out.
    """
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    norms = 2 * shape.hidden * (2 * compute_bytes + FLOAT32_BYTES)
    if shape.head_norms:
        norms += (queries + keys) * (compute_bytes + FLOAT32_BYTES)
    layer = norms + (4 * queries + 4 * shape.intermediate) * compute_bytes
    return together * layer + (shape.hidden + 2 * shape.intermediate) * compute_bytes


def table(plans: Mapping[str, Plan]) -> str:
    """A column a form and a row a part, for people."""
    lines = [["", *plans]]
    for title in ("generating", "learning", "host"):
        parts = [getattr(p, title) for p in plans.values()]
        lines.append(["in host memory" if title == "host" else title])
        lines += [[f"  {key}", *(size(p[key]) if p[key] else "-" for p in parts)] for key in parts[0]]
        lines.append(["  sum", *(size(sum(p.values())) if any(p.values()) else "-" for p in parts)])
    lines.append(["slots", *(f"{p.slots:,}" for p in plans.values())])
    lines.append(["micro-batch tokens", *(f"{p.micro_tokens:,}" for p in plans.values())])
    lines.append(["boundary every", *(f"{p.boundary_every} layers" for p in plans.values())])
    lines.append(["backward together", *(f"{p.layers_together} layers" for p in plans.values())])
    lines.append(["", *("fits" if p.fits else "does not fit" for p in plans.values())])
    lines.append(["least budget", *(f"{gib_up(p.least_bytes):.1f} GiB" for p in plans.values())])
    return "\n".join("".join([f"{row[0]:<20}", *(f"{x:>17}" for x in row[1:])]).rstrip() for row in lines)


def return_large_blocks(least_bytes: int = 2 << 20) -> None:
    """From now on this process gives blocks of at least so many bytes back as soon as they are freed.

    glibc otherwise learns to keep blocks of up to 32 MiB in its heap, where the few entries that a step
    holds on to (weights.Transaction) lie between the freed gradients of the layers: their holes are
    never used again. With a Qwen2.5-0.5B shape that is 570 MiB of a step's peak, and still 190 MiB of it
    where blocks of up to 8 MiB stay. No effect elsewhere.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, least_bytes)


def return_free_memory() -> None:
    """Give what the C library keeps of freed memory back to the system, holes in its heap included.

    Loading leaves many: with a Qwen2.5-0.5B shape in int8, 180 MiB beside 470 MiB of weights.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def to_divide(gpu_bytes: int) -> int:
    """Of a GPU's memory, what a plan may fill: 22 of 24 GiB, as in the recipes.

    The rest is for CUDA's modules, cuBLAS' workspaces (32 MiB for each thread and stream) and gaps between
    blocks, which no plan counts, and for a plan that is off by 5 %. A plan without it runs out of memory.
    """
    return gpu_bytes * 11 // 12


def host_bytes() -> int:
    """Memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int:
    """The most memory this process has held since it started."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
