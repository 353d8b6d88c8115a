"""What a checkpoint's tensors and sizes are called in GGUF, and in which order their rows stand.

llama.cpp rotates neighbouring pairs of a head's entries for the architecture "llama" (Llama and Mistral),
where the checkpoint's halves belong together; so in q_proj and k_proj, weights and biases, row (h, k, d)
of [heads, 2, D / 2] stands in GGUF as row (h, d, k). Qwen2 and Qwen3 keep their rows.

Source: ggml-org/llama.cpp conversion/llama.py (`permute`, `generate_extra_tensors`), conversion/base.py
(`set_gguf_parameters`), gguf-py/gguf/tensor_mapping.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .file import BOOL, F32, STRING, U32, Gguf, Metadata

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
PERMUTED = "llama"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WHOLE = {EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight", HEAD: "output.weight"}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ROPE_FACTORS = "rope_freqs.weight"
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")

Array = npt.NDArray[Any]


def gguf_name(name: str) -> str | None:
    """A checkpoint's tensor in GGUF; None for one that has no place there."""
    if name in WHOLE:
        return WHOLE[name]
    match = LAYER.fullmatch(name)
    part = PARTS.get(match[2]) if match else None
    return f"blk.{match[1]}.{part}.{match[3]}" if match and part else None


def heads_of(name: str, config: Mapping[str, Any]) -> int | None:
    """Over how many heads the rows of a tensor are permuted, by a config.json; None: they are not."""
    if ARCHITECTURES.get(config["model_type"]) != PERMUTED:
        return None
    heads = int(config["num_attention_heads"])
    return _heads(name, heads, int(config.get("num_key_value_heads") or heads))


def heads_in(gguf: Gguf, name: str) -> int | None:
    """As `heads_of`, by a GGUF's own metadata. Raises InputError."""
    if gguf.architecture != PERMUTED:
        return None
    heads = gguf.metadata.get("llama.attention.head_count")
    key_heads = gguf.metadata.get("llama.attention.head_count_kv", heads)
    if not isinstance(heads, int) or not isinstance(key_heads, int):
        raise InputError(f"{gguf.path}: does not say how many heads it has; convert the checkpoint again")
    return _heads(name, heads, key_heads)


def _heads(name: str, heads: int, key_heads: int) -> int | None:
    if ".self_attn.q_proj." in name:
        return heads
    return key_heads if ".self_attn.k_proj." in name else None


def row_in_gguf(rows: int, heads: int | None) -> Array:
    """Where each row [O] of the checkpoint stands in GGUF."""
    row_O = np.arange(rows)
    if heads is None:
        return row_O
    size = rows // heads
    head_O, place_O = np.divmod(row_O, size)
    half_O, pair_O = np.divmod(place_O, size // 2)
    return head_O * size + pair_O * 2 + half_O


def row_in_checkpoint(rows: int, heads: int | None) -> Array:
    """Inverse of `row_in_gguf`."""
    return np.argsort(row_in_gguf(rows, heads))


def metadata_of(config: Mapping[str, Any], name: str) -> Metadata:
    """Sizes and constants of a config.json. Raises InputError for what llama.cpp would compute otherwise."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise InputError(
            f"model {name}: the architecture {kind!r} is not written as GGUF; supported are: "
            f"{', '.join(ARCHITECTURES)}"
        )
    _refuse_unknown(config, name)
    arch = ARCHITECTURES[kind]
    heads, rope = int(config["num_attention_heads"]), rope_of(config)
    size = head_size(config)
    values: Metadata = {
        "general.architecture": (STRING, arch),
        "general.name": (STRING, Path(name).name),
        f"{arch}.block_count": (U32, config["num_hidden_layers"]),
        f"{arch}.context_length": (U32, context_length(config)),
        f"{arch}.embedding_length": (U32, config["hidden_size"]),
        f"{arch}.feed_forward_length": (U32, config["intermediate_size"]),
        f"{arch}.attention.head_count": (U32, heads),
        f"{arch}.attention.head_count_kv": (U32, config.get("num_key_value_heads") or heads),
        f"{arch}.attention.layer_norm_rms_epsilon": (F32, config.get("rms_norm_eps", 1e-6)),
        f"{arch}.attention.key_length": (U32, size),
        f"{arch}.attention.value_length": (U32, size),
        f"{arch}.rope.dimension_count": (U32, size),
        f"{arch}.rope.freq_base": (F32, rope.get("rope_theta") or 10000.0),
        f"{arch}.vocab_size": (U32, config["vocab_size"]),
    }
    scaling = rope["rope_type"]
    if scaling in ("linear", "yarn"):
        values[f"{arch}.rope.scaling.type"] = (STRING, scaling)
        values[f"{arch}.rope.scaling.factor"] = (F32, rope["factor"])
    if scaling == "yarn":
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        values[f"{arch}.rope.scaling.original_context_length"] = (U32, original)
        values[f"{arch}.rope.scaling.finetuned"] = (BOOL, True)
    return values


def _refuse_unknown(config: Mapping[str, Any], name: str) -> None:
    """What changes a model's arithmetic and has no key in GGUF for these architectures."""
    rope = rope_of(config)
    known = {
        "default": set(),
        "linear": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        "yarn": {"factor", "original_max_position_embeddings"},
    }.get(rope["rope_type"])
    if known is None:
        raise InputError(
            f"model {name}: its rope scaling {rope['rope_type']!r} is not written as GGUF; supported are "
            "default, linear, llama3 and yarn"
        )
    more = (
        {key for key, value in rope.items() if value is not None}
        - known
        - {"rope_type", "rope_theta", "type"}
    )
    if more:
        raise InputError(
            f"model {name}: its rope scaling sets {', '.join(sorted(more))}, which is not written as GGUF; "
            f"with {rope['rope_type']} it may set {', '.join(sorted(known)) or 'nothing'}"
        )
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise InputError(
            f"model {name}: its activation {activation!r} is not silu, llama.cpp's only one here"
        )


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope settings of a config.json, old spelling or new, with a `rope_type`."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rope["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta")
    return rope


def head_size(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def context_length(config: Mapping[str, Any]) -> int:
    """Positions, or the sliding window that is in use: llama.cpp has none for these architectures."""
    limit = int(config["max_position_embeddings"])
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    slides = "sliding_attention" in kinds if kinds else window and config.get("use_sliding_window", True)
    return min(limit, int(window)) if slides and window else limit


def rope_factors(config: Mapping[str, Any]) -> Array | None:
    """[D / 2] divisors of the rotary frequencies, float32, where the scaling is Llama 3's."""
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    size, theta = head_size(config), float(rope.get("rope_theta") or 10000.0)
    low, high = float(rope.get("low_freq_factor") or 1.0), float(rope.get("high_freq_factor") or 4.0)
    factor, original = float(rope.get("factor") or 8.0), rope.get("original_max_position_embeddings") or 8192
    power_D = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    wavelength_D = 2 * math.pi * (np.float32(theta) ** power_D)
    smooth_D = (original / wavelength_D - low) / (high - low)
    between_D = 1 / ((1 - smooth_D) / factor + smooth_D)
    factors_D = np.where(wavelength_D > original / low, factor, between_D)
    return np.where(wavelength_D < original / high, 1.0, factors_D).astype(np.float32)
