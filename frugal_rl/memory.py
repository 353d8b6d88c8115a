"""One memory budget, divided before the model is loaded, and what was really used.

The phases take turns on one device: the KV pool exists only while generating, boundary states and
gradients only while learning. So the budget must hold the larger of

    generating: weights + slots * (KV entries + logits) + prefill
    learning:   weights + boundary states + one layer's gradient + one micro-batch's activations

and what is left over the fixed parts decides `slots` and `micro_tokens`, the two numbers that nobody
should have to choose. Everything is computed from the model's config and the lengths. No torch.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InputError

FLOAT32_BYTES = 4
HEAD_BYTES = 4 * (32 << 20)  # the head's blocks: rows, their gradient, logits and a copy (decoder.py)
# the most tokens that go through a layer together: on a GPU its products gain nothing beyond; on a CPU the
# activations stay in the cache (the embedded model learns 1.6 times as fast as with 4096)
MOST_MICRO_TOKENS = {"device": 8192, "host": 1024}


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, as its config.json gives them."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool

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
        )

    @property
    def layer_parameters(self) -> int:
        """Matrices of one layer; norms and biases are noise."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + embeddings


@dataclass(frozen=True)
class Plan:
    """How the budget is divided. `boundary_on_host`: whether states at layer boundaries leave the device."""

    slots: int
    micro_tokens: int
    boundary_on_host: bool
    budget_bytes: int
    weights_bytes: int
    generating_bytes: int
    learning_bytes: int


def plan(
    shape: Shape,
    *,
    budget_bytes: int,
    storage_bytes: int,
    compute_bytes: int,
    sequences: int,
    prompt_tokens: int,
    response_tokens: int,
    has_host: bool,
) -> Plan:
    """Choose slots and micro-batch tokens for `sequences` rollouts of the given longest lengths.

    `storage_bytes`, `compute_bytes`: of an entry. `has_host`: the device has a host with memory of its
    own, so that boundary states may go there. Raises InputError when one slot or one sequence does
    not fit, saying what would.
    """
    longest = prompt_tokens + response_tokens
    weights = shape.parameters * storage_bytes
    copies = 0 if storage_bytes == compute_bytes else shape.layer_parameters * compute_bytes
    slot = 2 * shape.layers * shape.kv_heads * shape.head_size * longest * compute_bytes
    slot += 3 * FLOAT32_BYTES * shape.vocabulary  # logits, their softmax and its sum
    token = _activation_bytes(shape, compute_bytes)
    generating = weights + copies + longest * token  # one prompt's prefill at a time at least
    state = sequences * longest * shape.hidden * compute_bytes  # hidden states of the whole batch
    learning = (
        weights
        + copies
        + shape.layer_parameters * 2 * FLOAT32_BYTES  # the gradient, and the one being added
        # the states that predict a response token, normed, and their gradient
        + sequences * response_tokens * shape.hidden * (2 * compute_bytes + FLOAT32_BYTES)
        + HEAD_BYTES
    )
    states = (shape.layers + 2) * state  # at every boundary, and the gradient that travels down
    on_host = has_host and learning + states + longest * token > budget_bytes
    if not on_host:
        learning += states
    least = max(generating + slot, learning + longest * token)
    if least > budget_bytes:
        raise InputError(
            f"{shape.parameters / 1e9:.2f} G parameters with {sequences} sequences of up to {longest} "
            f"tokens need {least / 2**30:.1f} GiB, the budget is {budget_bytes / 2**30:.1f} GiB: take "
            "fewer prompts, samples or max_tokens, a smaller model, or raise memory.budget"
        )
    slots = min(sequences, (budget_bytes - generating) // slot)
    fitting = (budget_bytes - learning) // token
    micro = max(
        longest, min(fitting, MOST_MICRO_TOKENS["device" if has_host else "host"], sequences * longest)
    )
    return Plan(
        slots=int(slots),
        micro_tokens=int(micro),
        boundary_on_host=on_host,
        budget_bytes=budget_bytes,
        weights_bytes=weights,
        generating_bytes=int(generating + slots * slot),
        learning_bytes=int(learning + micro * token),
    )


def _activation_bytes(shape: Shape, compute_bytes: int) -> int:
    """What autograd keeps for one token of one layer, and its gradients at the widest place."""
    attention = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_size
    kept = 8 * shape.hidden + 3 * attention + 5 * shape.intermediate
    return 2 * kept * compute_bytes


def host_bytes() -> int:
    """Memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int:
    """The most memory this process has held since it started."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
