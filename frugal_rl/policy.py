"""A policy ready to be sampled, scored and trained: decoder, tokenizer and stop tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .decoder import Decoder, check_supported, parameter_names
from .errors import InputError
from .memory import peak_resident_bytes, return_free_memory
from .models import ModelFiles, load_config, load_tokenizer, stop_ids
from .weights import Weights


@dataclass(frozen=True)
class Policy:
    files: ModelFiles
    decoder: Decoder
    tokenizer: Any
    stop_ids: frozenset[int]
    held_bytes: int  # on the device by this process before the weights were read: on a CPU, its libraries

    @property
    def weights(self) -> Weights:
        return self.decoder.weights

    def text(self, response_ids: Any) -> str:
        """A response as a verifier and a person see it: without the stop token that ends it."""
        ids = [int(i) for i in response_ids]
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def raw_text(self, ids: Sequence[int]) -> str:
        """Every token as text, special ones included: what stop strings are looked for in."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def best_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_policy(
    files: ModelFiles, tokenizer: Any, device: torch.device, *, form: str = "bf16", whole: bool = False
) -> Policy:
    """Read the weights onto the device in a form of memory.FORMS; `whole`: see Weights.from_checkpoint.

    Raises InputError for what is not supported, by name.
    """
    config = load_config(files)
    check_supported(config)
    names = parameter_names(config)  # imports the model's class: libraries, too
    held = peak_resident_bytes() if device.type == "cpu" else torch.cuda.memory_allocated(device)
    weights = Weights.from_checkpoint(
        files.folder,
        device,
        name=files.name,
        names=names,
        quantise=form in ("int8", "host"),
        stream=form == "host",
        whole=whole,
    )
    return_free_memory()
    return Policy(files, Decoder(config, weights), tokenizer, stop_ids(files, tokenizer), held)


def load_reference(files: ModelFiles, policy: Policy) -> Decoder:
    """Another checkpoint as the reference policy: its matrices stay in host memory.

    Raises InputError where it is not supported, or does not have the policy's tokens.
    """
    config = load_config(files)
    check_supported(config)
    ours, theirs = policy.decoder.config.vocab_size, config.vocab_size
    if ours != theirs:
        raise InputError(
            f"the reference {files.name} has {theirs} tokens, {policy.files.name} has {ours}: "
            "a reference must share the policy's vocabulary"
        )
    if (files.folder / "tokenizer_config.json").exists():
        vocabulary = load_tokenizer(files).get_vocab()
        if vocabulary != policy.tokenizer.get_vocab():
            raise InputError(f"the reference {files.name} has another tokenizer than {policy.files.name}")
    device = policy.decoder.device
    weights = Weights.from_checkpoint(
        files.folder, device, name=files.name, names=parameter_names(config), stream=True
    )
    return Decoder(config, weights)
