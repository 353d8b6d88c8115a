"""LoRA as a baseline: peft's adapters inside the decoder's layers, over weights that stay as they are.

    y = W x + (alpha / r) B A x,   A [r, I] uniform in +-1/sqrt(I), B [O, r] zero; AdamW on A and B

peft wraps every linear module of the layers; the weights are still lent to them layer by layer
(decoder.py), so the base is held once, in bf16 or in int8 (the latter is what QLoRA does with 4 bits), and
sampler and learner both see base + adapters, unmerged: nothing is rounded while it trains, and the two are
one policy. The embedding, the head, the norms and the biases are frozen, and their gradients are never
computed.

The result has two forms: the adapter, in peft's format (`save`), and the patch that merges it into the
checkpoint (`merged`),

    w' = round_to_storage( float32(w) + (alpha / r) (B A)_w )

which is what peft's merge_and_unload gives. It loses what the rounding takes (`Merged.lost`).

Source: arXiv 2106.09685; "LoRA Without Regret" (all layers, alpha 32, 1 / r); huggingface/peft.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .arms import ALPHA, RANK
from .baselines import Dense, Make, cannot_go_on, optimizer, state_bytes
from .checkpoint import Checkpoint
from .decoder import Decoder
from .patch import BaseInfo, Patch, TensorPatch, write_atomically
from .storage import Changed, bits_of
from .stream import Source
from .weights import STORAGE, Commit, clip_factor, counts, sum_of_squares, unsigned

ADAPTER = "default"  # peft's name for the only one


@dataclass(frozen=True)
class Merged:
    """The adapters merged into the checkpoint: its changed entries, and the share of the update's norm that
    rounding takes."""

    changed: dict[str, Changed]
    lost: float


class Adapters:
    """Adapters of rank `rank` on all linear layers of a decoder, under one optimizer."""

    frozen = True

    def __init__(
        self,
        decoder: Decoder,
        make: Make,
        clip: float | None,
        *,
        rank: int | None = None,
        alpha: float | None = None,
        seed: int = 0,
    ) -> None:
        import peft

        self.decoder, self.clip = decoder, clip
        names = {
            id(t.module): t.name for targets in decoder.targets for t in targets if t.attribute == "weight"
        }
        linear = {type(m) for m in decoder.model.modules() if isinstance(m, nn.Linear)}
        assert linear == {nn.Linear}, f"linear layers of kinds that peft might not wrap: {linear}"
        paths = {
            path.rpartition(".")[2] for path, m in decoder.model.layers.named_modules() if type(m) in linear
        }
        self.config = peft.LoraConfig(
            r=RANK if rank is None else rank,
            lora_alpha=ALPHA if alpha is None else alpha,
            target_modules=sorted(paths),
            bias="none",
        )
        self.modules: dict[str, Any] = {}
        with torch.random.fork_rng(devices=[]):
            peft.inject_adapter_in_model(self.config, decoder.model)
            torch.manual_seed(seed)
            for module in decoder.model.modules():
                if not isinstance(module, peft.tuners.lora.LoraLayer):
                    continue
                # the weights have no memory until they are lent, and peft puts adapters beside them
                for part in (module.lora_A, module.lora_B):
                    part.to_empty(device="cpu")
                module.reset_lora_parameters(ADAPTER, True)
                for part in (module.lora_A, module.lora_B):
                    part.to(device=decoder.device, dtype=torch.float32)
                self.modules[names[id(module.get_base_layer())]] = module
        self.parameters = [p for m in self.modules.values() for p in (_a(m), _b(m))]
        self.optimizer = make(self.parameters)

    @property
    def entries(self) -> int:
        return sum(p.numel() for p in self.parameters)

    @property
    def nbytes(self) -> int:
        """Of the adapters, and of the states."""
        return sum(p.nbytes for p in self.parameters) + state_bytes(self.optimizer)

    def begin(self) -> AdapterUpdate:
        for parameter in self.parameters:  # what a step left that ran out of memory
            parameter.grad = None
        return AdapterUpdate(self)

    @contextmanager
    def off(self) -> Iterator[None]:
        for module in self.modules.values():
            module.enable_adapters(False)
        try:
            yield
        finally:
            for module in self.modules.values():
                module.enable_adapters(True)

    def merged(self, folder: Path) -> Merged:
        """Into the checkpoint in `folder`, tensor by tensor."""
        checkpoint = Checkpoint(folder)
        changed, update, lost = {}, 0.0, 0.0
        with torch.no_grad():
            for name, module in sorted(self.modules.items()):
                info = checkpoint.tensors[name]
                base_OI = torch.empty(info.shape, dtype=STORAGE[info.dtype], device=self.decoder.device)
                Source(info, base_OI.dtype).copy_to_(base_OI)
                delta_OI = module.get_delta_weight(ADAPTER).float()
                exact_OI = base_OI.float() + delta_OI
                after_OI = exact_OI.to(base_OI.dtype)
                update += float(delta_OI.double().square().sum())
                lost += float((after_OI.double() - exact_OI.double()).square().sum())
                before_N, after_N = bits_of(base_OI), bits_of(after_OI)
                position_N = torch.nonzero(before_N != after_N).view(-1)
                if len(position_N):
                    changed[name] = Changed(position_N, before_N[position_N], after_N[position_N])
        return Merged(changed, math.sqrt(lost / update) if update else 0.0)

    def changed_counts(self, folder: Path) -> tuple[int, int]:
        """As Weights.changed_counts, of the checkpoint once merged."""
        tensors = Checkpoint(folder).tensors
        return counts((c, STORAGE[tensors[name].dtype]) for name, c in self.merged(folder).changed.items())

    def patch(self, folder: Path, name: str, meta: dict[str, Any]) -> tuple[Patch, float]:
        """The patch that merges the adapters into the checkpoint, and Merged.lost."""
        checkpoint, merged = Checkpoint(folder), self.merged(folder)
        tensors = {
            key: TensorPatch.from_bits(
                checkpoint.tensors[key].dtype,
                checkpoint.tensors[key].shape,
                entries.position_N.cpu().numpy(),
                unsigned(entries.before_bits_N),
                unsigned(entries.after_bits_N),
            )
            for key, entries in merged.changed.items()
        }
        return Patch(tensors, BaseInfo(name, checkpoint.fingerprints()), meta), merged.lost

    def save(self, folder: Path, base: str) -> int:
        """Write the adapter as peft's PeftModel.from_pretrained reads it. Returns its bytes."""
        from safetensors.torch import save

        tensors = {}
        for name, module in self.modules.items():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = _a(module).detach().cpu().contiguous()
            tensors[f"{stem}.lora_B.weight"] = _b(module).detach().cpu().contiguous()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.config.r,
            "lora_alpha": self.config.lora_alpha,
            "lora_dropout": 0.0,
            "target_modules": sorted(self.config.target_modules),
            "bias": "none",
            "inference_mode": True,
        }
        folder.mkdir(exist_ok=True)
        write_atomically(folder / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())
        data = save(tensors)
        write_atomically(folder / "adapter_model.safetensors", data)
        return len(data)


@dataclass
class AdapterUpdate:
    """One step of `adapters`: autograd leaves the gradients in the adapters themselves."""

    adapters: Adapters

    def propose(
        self, name: str, gradient: Tensor, *, first_row: int = 0, row_R: Tensor | None = None
    ) -> None:
        raise AssertionError(f"{name} is frozen and got a gradient")

    def commit(self) -> Commit:
        """As weights.Transaction.commit, of the adapters."""
        parameters = self.adapters.parameters
        gradients = [p.grad for p in parameters if p.grad is not None]
        assert len(gradients) == len(parameters), "an adapter got no gradient"
        square = torch.stack([sum_of_squares(g) for g in gradients]).sum()
        norm, factor = float(square.sqrt()), float(clip_factor(square.sqrt(), self.adapters.clip))
        if not math.isfinite(norm):
            return Commit(norm, 0.0, {}, dropped=f"the gradient's norm is {norm}")
        if norm == 0:
            return Commit(norm, factor, {})
        adapted = 0
        for parameter in parameters:
            parameter.grad = None
        try:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                before = parameter.detach().clone()
                parameter.grad = gradient.mul_(factor)
                self.adapters.optimizer.step()  # a parameter without a gradient is passed over
                parameter.grad = None
                adapted += int((before != parameter).sum())
        except torch.OutOfMemoryError as error:
            raise cannot_go_on(error) from error
        return Commit(norm, factor, {}, adapted=adapted)


def make_baseline(
    kind: str,
    decoder: Decoder,
    *,
    lr: float,
    clip: float | None,
    momentum: float | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    seed: int = 0,
) -> Dense | Adapters | None:
    """What a kind of arms.KINDS trains with; None: plain SGD, the learner's own."""
    if kind == "sgd":
        return None
    make = optimizer(kind, lr, momentum)
    if kind == "lora":
        return Adapters(decoder, make, clip, rank=rank, alpha=alpha, seed=seed)
    return Dense(decoder.weights, make, clip)


def _a(module: Any) -> nn.Parameter:
    return module.lora_A[ADAPTER].weight


def _b(module: Any) -> nn.Parameter:
    return module.lora_B[ADAPTER].weight
