"""A GGUF of a Hugging Face folder or of weights in memory, tensor by tensor.

Matrices get the asked format; norms and biases stay float32, and so does what llama.cpp adds. A matrix whose
rows are no multiple of the format's block is float16, as in llama.cpp's own converter.

Law: the file is a function of the values alone, and each tensor's bytes of its own values alone; so what a
patch makes of the file (change.py) is what the patched checkpoint converts to, in every bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint import Checkpoint, map_tensor
from ..container import some
from ..errors import InputError
from ..models import ModelFiles
from .file import STRING, U32, Metadata, Planned, spans, write
from .formats import FORMATS, Format, values_of_bits
from .layout import (
    EMBEDDING,
    HEAD,
    ROPE_FACTORS,
    gguf_name,
    heads_of,
    metadata_of,
    rope_factors,
    row_in_checkpoint,
)

TYPES = {"q8_0": "Q8_0", "bf16": "BF16", "f16": "F16", "f32": "F32"}
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # llama.cpp's enum llama_ftype
QUANTISATION_VERSION = 2
LARGEST_F16 = 65504.0
CHUNK_ENTRIES = 1 << 22  # read, permuted and encoded at a time: 16 MiB in float32

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Values:
    """A tensor of the policy: `rows` gives float32 rows [R, ...] by number, for a slice or an array [R]."""

    shape: tuple[int, ...]
    rows: Callable[[Any], Array]


def values_of_checkpoint(checkpoint: Checkpoint) -> dict[str, Values]:
    """Every tensor of a folder. Raises InputError for a format that GGUF does not take from a checkpoint."""
    found = {}
    for name, info in checkpoint.tensors.items():
        if info.dtype not in FORMATS:
            raise InputError(
                f"{checkpoint.folder}: {name} is {info.dtype}; GGUF is written of F32, F16 and BF16: take an "
                "unquantised checkpoint"
            )

        def rows(which: Any, info: Any = info) -> Array:
            return values_of_bits(info.dtype, np.asarray(map_tensor(info, "r").reshape(info.shape)[which]))

        found[name] = Values(info.shape, rows)
    return found


def form_of(shape: tuple[int, ...], kind: str) -> Format:
    """The format of a tensor of this shape in a file of a kind of TYPES."""
    form = FORMATS[TYPES[kind]]
    if len(shape) < 2:
        return FORMATS["F32"]
    return form if shape[-1] % form.block == 0 else FORMATS["F16"]


def tensors_of(config: Mapping[str, Any], values: Mapping[str, Values], kind: str) -> list[Planned]:
    """What a file holds, in a fixed order. Raises InputError."""
    kept = {n: v for n, v in values.items() if not (n == HEAD and config.get("tie_word_embeddings"))}
    unknown = [name for name in kept if gguf_name(name) is None]
    if unknown:
        raise InputError(
            f"{some(unknown)}: no place in GGUF is known for this tensor of a {config['model_type']}"
        )
    if EMBEDDING not in kept or not (config.get("tie_word_embeddings") or HEAD in kept):
        raise InputError(
            f"the checkpoint lacks {EMBEDDING if EMBEDDING not in kept else HEAD}, which its config needs"
        )
    planned = []
    factors_D = rope_factors(config)
    if factors_D is not None:
        planned.append(Planned(ROPE_FACTORS, factors_D.shape, FORMATS["F32"], [factors_D.view(np.uint8)]))
    for name, value in kept.items():
        form, target = form_of(value.shape, kind), gguf_name(name)
        assert target is not None
        chunks = encoded(name, value, form, heads_of(name, config))
        planned.append(Planned(target, value.shape, form, chunks))
    return planned


def encoded(name: str, value: Values, form: Format, heads: int | None) -> Iterator[Array]:
    """A tensor's blocks in GGUF's order, uint8 [N, block_bytes] at a time. Raises InputError."""
    rows, width = value.shape[0], math.prod(value.shape[1:])
    order_O = None if heads is None else row_in_checkpoint(rows, heads)
    for start, stop in spans(rows, max(1, CHUNK_ENTRIES // width)):
        part = value.rows(slice(start, stop) if order_O is None else order_O[start:stop])
        if form.name == "F16" and np.abs(part).max() > LARGEST_F16:
            raise InputError(
                f"{name}: holds {float(np.abs(part).max()):g}, beyond float16's largest number; write bf16"
            )
        yield form.encode(part.reshape(-1, form.block))


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    values: Mapping[str, Values],
    kind: str,
    *,
    name: str,
    vocabulary: Metadata | None = None,
) -> int:
    """Write a file whole or not at all; returns its bytes. Without a vocabulary it only takes token ids.

    Raises InputError for what llama.cpp would not compute as the checkpoint's own model does.
    """
    metadata = metadata_of(config, name)
    metadata["general.file_type"] = (U32, FILE_TYPES[TYPES[kind]])
    metadata["general.quantization_version"] = (U32, QUANTISATION_VERSION)
    metadata |= vocabulary or {"tokenizer.ggml.model": (STRING, "none")}
    return write(path, metadata, tensors_of(config, values, kind))


def convert(files: ModelFiles, path: Path, kind: str, vocabulary: Metadata | None) -> int:
    """Write a folder's GGUF; as `write_gguf`."""
    values = values_of_checkpoint(Checkpoint(files.folder))
    return write_gguf(path, files.config, values, kind, name=files.name, vocabulary=vocabulary)
