"""Sizes of a model from its config.json alone, and the shapes of known models by name. No torch.

A name is looked up as a folder, as one of the shapes below, as an embedded model and on the hub, in this
order; from the hub the config alone is fetched. Source: the config.json of each model on the hub; a test
holds the count of parameters against the model card's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import InputError
from .memory import Shape
from .models import EMBEDDED, read_config_json

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
STORAGE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
#                  layers hidden  intermediate heads KV head vocabulary tied
KNOWN = {
    "Qwen2.5-0.5B": Shape(24, 896, 4864, 14, 2, 64, 151936, tied=True),
    "Qwen2.5-1.5B": Shape(28, 1536, 8960, 12, 2, 128, 151936, tied=True),
    "Qwen2.5-3B": Shape(36, 2048, 11008, 16, 2, 128, 151936, tied=True),
    "Qwen2.5-7B": Shape(28, 3584, 18944, 28, 4, 128, 152064, tied=False),
    "Qwen2.5-14B": Shape(48, 5120, 13824, 40, 8, 128, 152064, tied=False),
    "Qwen2.5-32B": Shape(64, 5120, 27648, 40, 8, 128, 152064, tied=False),
    "Qwen2.5-Math-1.5B": Shape(28, 1536, 8960, 12, 2, 128, 151936, tied=True),
    "Qwen2.5-Math-7B": Shape(28, 3584, 18944, 28, 4, 128, 152064, tied=False),
    "Qwen3-0.6B": Shape(28, 1024, 3072, 16, 8, 128, 151936, tied=True, head_norms=True),
    "Qwen3-1.7B": Shape(28, 2048, 6144, 16, 8, 128, 151936, tied=True, head_norms=True),
    "Qwen3-4B": Shape(36, 2560, 9728, 32, 8, 128, 151936, tied=True, head_norms=True),
    "Qwen3-8B": Shape(36, 4096, 12288, 32, 8, 128, 151936, tied=False, head_norms=True),
    "Qwen3-14B": Shape(40, 5120, 17408, 40, 8, 128, 151936, tied=False, head_norms=True),
    "Qwen3-32B": Shape(64, 5120, 25600, 64, 8, 128, 151936, tied=False, head_norms=True),
    "Llama-3.2-1B": Shape(16, 2048, 8192, 32, 8, 64, 128256, tied=True),
    "Llama-3.2-3B": Shape(28, 3072, 8192, 24, 8, 128, 128256, tied=True),
    "Llama-3.1-8B": Shape(32, 4096, 14336, 32, 8, 128, 128256, tied=False),
    "Mistral-7B-v0.1": Shape(32, 4096, 14336, 32, 8, 128, 32000, tied=False),
    "Mistral-7B-v0.3": Shape(32, 4096, 14336, 32, 8, 128, 32768, tied=False),
}
VARIANTS = ("-Instruct", "-Base")  # of the same shape
OWNERS = ("Qwen", "meta-llama", "mistralai")


def known_shape(name: str) -> Shape | None:
    """One of KNOWN, with or without its owner and a variant's ending; "Mistral-7B" is v0.3."""
    owner, _, bare = name.rpartition("/")
    for ending in VARIANTS:
        bare = bare.removesuffix(ending)
    bare = {"Mistral-7B": "Mistral-7B-v0.3"}.get(bare, bare)
    return KNOWN.get(bare) if not owner or owner in OWNERS else None


def find_shape(name: str) -> tuple[Shape, int]:
    """The shape of a model and the bytes of a stored entry. Raises InputError."""
    if not Path(name).is_dir():
        shape = known_shape(name)
        if shape is not None:
            return shape, STORAGE_BYTES["bfloat16"]
    return read_config(read_config_json(_config_path(name), name), name)


def read_config(config: Mapping[str, Any], name: str) -> tuple[Shape, int]:
    """From the content of a config.json. Raises InputError for an architecture that is not trained here."""
    kind = config.get("model_type")
    if kind not in SUPPORTED:
        raise InputError(
            f"model {name}: the architecture {kind!r} is not supported; supported are: {', '.join(SUPPORTED)}"
        )
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if "quantization_config" in config or dtype not in STORAGE_BYTES:
        raise InputError(
            f"model {name}: its config says {dtype!r} or is quantised; expected an unquantised checkpoint "
            f"in {', '.join(STORAGE_BYTES)}"
        )
    missing = [key for key in SIZES if not isinstance(config.get(key), int) or config[key] < 1]
    if missing:
        raise InputError(f"model {name}: its config.json gives no size for {', '.join(missing)}")
    return Shape.from_config(config), STORAGE_BYTES[dtype]


def _config_path(name: str) -> Path:
    if name in EMBEDDED:
        return EMBEDDED[name] / "config.json"
    if Path(name).is_dir():
        return Path(name) / "config.json"
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise InputError(
            f"model {name!r} is no folder here, not embedded ({', '.join(EMBEDDED)}), not a hub name such as "
            f"Qwen/Qwen2.5-0.5B and not one of {', '.join(KNOWN)}"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"model {name!r}: its config.json could not be downloaded: {error}") from error
