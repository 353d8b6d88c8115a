"""From a model's name to its folder, config, tokenizer and stop tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .errors import InputError

EMBEDDED = {"tiny": Path(__file__).parent / "assets" / "tiny"}
FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # what a hub download needs


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk. `config` is config.json as it stands."""

    name: str
    folder: Path
    config: dict[str, Any]

    def storage_bytes(self) -> int:
        """Bytes of an entry of the largest kind of tensor. Raises InputError if not safetensors."""
        tensors = Checkpoint(self.folder).tensors.values()
        return max({"F32": 4, "F16": 2, "BF16": 2}.get(t.dtype, 8) for t in tensors)


def find_model(name: str) -> ModelFiles:
    """`name`: an embedded model, a local folder, or a hub name (downloaded once). Raises InputError."""
    if name in EMBEDDED:
        folder = EMBEDDED[name]
    elif Path(name).is_dir():
        folder = Path(name)
    elif Path(name).exists():
        raise InputError(f"model {name} is a file; give the folder of a Hugging Face checkpoint")
    else:
        folder = _download(name)
    config = read_config_json(folder / "config.json", name)
    return ModelFiles(name, folder, config)


def read_config_json(path: Path, name: str) -> dict[str, Any]:
    """A model's config.json as it stands. Raises InputError, which names the model."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"model {name}: {path} is missing; is it a Hugging Face folder?") from None
    except ValueError as error:
        raise InputError(f"model {name}: {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"model {name}: {path} holds no JSON object")
    return config


def _download(name: str) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise InputError(
            f"model {name!r} is no folder here, not embedded ({', '.join(EMBEDDED)}) and not a hub "
            "name such as Qwen/Qwen2.5-0.5B"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"model {name!r} is no folder here and could not be downloaded: {error}") from error


def load_tokenizer(files: ModelFiles) -> Any:
    """The model's own tokenizer. Raises InputError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(files.folder)
    except (OSError, ValueError) as error:
        raise InputError(f"model {files.name}: its tokenizer does not load: {error}") from error


def load_config(files: ModelFiles) -> Any:
    """The transformers config. Raises InputError for a kind that transformers or we do not know."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(files.folder)
    except (OSError, ValueError) as error:
        raise InputError(f"model {files.name}: its config does not load: {error}") from error


def stop_ids(files: ModelFiles, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a response: of the generation config, the config and the tokenizer."""
    found: set[int] = set()
    sources: list[Any] = [files.config.get("eos_token_id"), tokenizer.eos_token_id]
    path = files.folder / "generation_config.json"
    if path.exists():
        sources.append(json.loads(path.read_text(encoding="utf-8")).get("eos_token_id"))
    for source in sources:
        found.update([source] if isinstance(source, int) else source or [])
    if not found:
        raise InputError(f"model {files.name} names no end-of-sequence token: responses never end")
    return frozenset(found)
