"""One token a slot through all layers, on a GPU: transformers' modules hold the weights, kernels do the rest.

What a transformers layer computes, in its order and with its roundings (models/qwen3/modeling_qwen3.py, and
its likes for Llama, Mistral and Qwen2, transformers 5), but what stands between two products is one launch
(kernels/fused.py). Prompts and the learner go through the modules' own forward: their launches have enough
to do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..decoder import Decoder, Observe, attention
from ..kernels.choice import use_triton
from .cache import Decode


def fits(decoder: Decoder) -> bool:
    """Whether `token_layers` computes what the model's own layers do, and has kernels for it."""
    if not use_triton(decoder.device):
        return False
    from ..kernels.fused import MOST_ROW

    first = decoder.layers[0]
    turned = 2 * decoder.model.rotary_emb.inv_freq.numel()
    some = torch.linspace(-4, 4, 9)
    gates = torch.allclose(first.mlp.act_fn(some), nn.functional.silu(some))
    return gates and turned == first.self_attn.head_dim and decoder.config.hidden_size <= MOST_ROW


def token_layers(
    decoder: Decoder, hidden_S1D: Tensor, position_S1: Tensor, cache: Decode, observe: Observe | None = None
) -> Tensor:
    """Normed hidden states [S, D], for the head, of one token a slot. Writes the cache's entries. No sync."""
    from ..kernels.fused import add_norm, gated, norm

    arguments = decoder.arguments(hidden_S1D, position_S1)
    hidden_SD, added_SD = hidden_S1D[:, 0], None
    for index, caught in enumerate(arguments):
        with decoder.layer(index) as module:
            layer: Any = module
            before = layer.input_layernorm
            if added_SD is None:
                normed_SD = norm(hidden_SD, before.weight, before.variance_epsilon)
            else:
                hidden_SD, normed_SD = add_norm(hidden_SD, added_SD, before.weight, before.variance_epsilon)
            added_SD = _attend(layer.self_attn, normed_SD, caught["position_embeddings"], cache, observe)
            between, mlp = layer.post_attention_layernorm, layer.mlp
            hidden_SD, normed_SD = add_norm(hidden_SD, added_SD, between.weight, between.variance_epsilon)
            added_SD = mlp.down_proj(gated(mlp.gate_proj(normed_SD), mlp.up_proj(normed_SD)))
    assert added_SD is not None, "a model has layers"
    with decoder.norm() as module:
        last: Any = module
        return add_norm(hidden_SD, added_SD, last.weight, last.variance_epsilon)[1]


def _attend(
    module: Any, normed_SD: Tensor, turns: tuple[Tensor, Tensor], cache: Decode, observe: Observe | None
) -> Tensor:
    """The attention block's output [S, D]; `turns`: cosines and sines [S, 1, D of a head]."""
    from ..kernels.fused import norm, rotate_and_keep

    slots = len(normed_SD)
    query_SHD, key_SKD, value_SKD = (
        project(normed_SD).view(slots, -1, module.head_dim)
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    if hasattr(module, "q_norm"):
        query_SHD = norm(query_SHD, module.q_norm.weight, module.q_norm.variance_epsilon)
        key_SKD = norm(key_SKD, module.k_norm.weight, module.k_norm.variance_epsilon)
    cos_SD, sin_SD = (turn.expand(slots, -1, -1)[:, 0] for turn in turns)
    key_SKCD, value_SKCD = cache.entries(module.layer_idx)
    query_SHD = rotate_and_keep(
        query_SHD, key_SKD, value_SKD, cos_SD, sin_SD, key_SKCD, value_SKCD, cache.entry_S
    )
    out_S1HD, _ = attention(
        module,
        query_SHD[:, :, None],
        key_SKCD,
        value_SKCD,
        None,
        scaling=module.scaling,
        slot_mask=cache.mask,
        observe=observe,
        live=cache.live,
    )
    return module.o_proj(out_S1HD.reshape(slots, -1))
