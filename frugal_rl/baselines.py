"""What people train with instead of plain SGD: AdamW, AdamW with 8-bit moments, SGD with momentum.

They learn from the very gradients that plain SGD learns from: the same layer-by-layer pass over the same
micro-batches, the same head (learn.py). So a difference in score or in memory is the optimizer's. A step
begins with a `Collected` update, which is a dense gradient of the whole model, and ends

    m += optimizer(c * g),   c = min(1, clip / (||g|| + 1e-6))       in float32, tensor by tensor
    w' = round_to_storage(m),   an entry changes when w' has other bits than w

with m the float32 masters, so that the engine samples, and the next gradient is computed at, the masters
rounded (arms.py says why they are float32, and what is held). Where the checkpoint is float32, the master
is the policy's own tensor. Gradients are freed as they are used, and do not exist while sampling. The
weights are held as storage.Whole: an overlay of ten bytes for each of many changed entries would be ours,
not the optimizer's.

The journal gets each step's patch, as with plain SGD, but it is not the whole state: a run does not go on
(arms.check_resumable).

Law: with momentum 0 and float32 weights this is weights.Transaction. A gradient of norm 0 changes nothing,
not even a moment or a step count; one that is not finite drops the step whole.

Source: torch.optim and bitsandbytes.optim as they are. Differs from huggingface/trl: no autocast and no
second copy of the model; the learner's pass stands for gradient checkpointing.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .arms import MOMENTUM
from .errors import FrugalError, InputError
from .storage import Changed, Plain, bits_of
from .weights import Commit, Weights, clip_factor, sum_of_squares

PACKAGES = {"adamw8bit": "bitsandbytes", "lora": "peft"}
BETAS, EPSILON, DECAY = (0.9, 0.999), 1e-8, 0.0

Make = Callable[[Sequence[nn.Parameter]], Any]


def require(kind: str) -> None:
    """Import what a kind needs, before memory is measured. Raises InputError where it is not installed."""
    package = PACKAGES.get(kind)
    if package is None:
        return
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f'learner.kind = "{kind}" needs {package}, which is not there ({error}): pip install {package}'
        ) from error


def optimizer(kind: str, lr: float, momentum: float | None = None) -> Make:
    """What makes the torch optimizer of a kind, its states in place: what does not fit fails before a step.

    Fused: no scratch of a tensor's size.
    """

    def make(parameters: Sequence[nn.Parameter]) -> Any:
        weight = MOMENTUM if momentum is None else momentum
        if kind == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            made = AdamW8bit(parameters, lr=lr, betas=BETAS, eps=EPSILON, weight_decay=DECAY)
            made.check_overrides()
            for place, parameter in enumerate(parameters):
                made.init_state(made.param_groups[0], parameter, 0, place)
            return made
        if kind == "sgd-momentum":
            made = torch.optim.SGD(parameters, lr=lr, momentum=weight, fused=True)
            names = ["momentum_buffer"] if weight else []
        else:
            made = torch.optim.AdamW(
                parameters, lr=lr, betas=BETAS, eps=EPSILON, weight_decay=DECAY, fused=True
            )
            names = ["exp_avg", "exp_avg_sq"]
        for parameter in parameters:
            made.state[parameter] = {name: torch.zeros_like(parameter) for name in names}
            if "exp_avg" in names:
                made.state[parameter]["step"] = torch.zeros((), device=parameter.device)
        return made

    return make


class Dense:
    """All weights under one optimizer with float32 masters."""

    frozen = False

    def __init__(self, weights: Weights, make: Make, clip: float | None) -> None:
        self.weights, self.clip = weights, clip
        self.masters: dict[str, nn.Parameter] = {}
        for name, held in weights.held.items():
            assert isinstance(held, Plain), f"{name} is not held in the checkpoint's format"
            self.masters[name] = nn.Parameter(held.tensor.float())
        self.optimizer = make(list(self.masters.values()))

    @property
    def nbytes(self) -> int:
        """Of masters that are not the weights themselves, and of the states."""
        masters = [m.nbytes for n, m in self.masters.items() if not self._shared(n)]
        return sum(masters) + state_bytes(self.optimizer)

    def _shared(self, name: str) -> bool:
        return self.weights.held[name].dtype == torch.float32

    def begin(self) -> Collected:
        return Collected(self)

    def off(self) -> AbstractContextManager[None]:
        return self.weights.base()

    def _advance(self, name: str, gradient: Tensor) -> Changed:
        """One tensor's step: of its master, and as bits of the policy's tensor. Nothing is written there."""
        held, master = self.weights.held[name], self.masters[name]
        assert isinstance(held, Plain)
        before_bits_N = bits_of(held.tensor)
        if self._shared(name):
            before_bits_N = before_bits_N.clone()
        master.grad = gradient
        self.optimizer.step()  # a parameter without a gradient is passed over
        master.grad = None
        after_bits_N = bits_of(master.detach().to(held.dtype))
        position_N = torch.nonzero(after_bits_N != before_bits_N).view(-1)
        return Changed(position_N, before_bits_N[position_N], after_bits_N[position_N])


@dataclass
class Collected:
    """One step of `dense`: gradients in, one commit out."""

    dense: Dense
    _square: Tensor | None = None
    _gradient: dict[str, Tensor] = field(default_factory=dict)

    def propose(
        self, name: str, gradient: Tensor, *, first_row: int = 0, row_R: Tensor | None = None
    ) -> None:
        """As weights.Transaction.propose. A gradient of a whole tensor is taken over, not copied."""
        square = sum_of_squares(gradient)
        self._square = square if self._square is None else self._square + square
        shape = self.dense.masters[name].shape
        if row_R is None and gradient.shape == shape:
            self._gradient[name] = gradient
            return
        if name not in self._gradient:
            self._gradient[name] = torch.zeros(shape, device=gradient.device)
        rows = slice(first_row, first_row + len(gradient)) if row_R is None else row_R
        self._gradient[name][rows] = gradient

    def commit(self) -> Commit:
        """Clip by the global norm, step every tensor, write what changed. Raises FrugalError."""
        assert self._square is not None, "no gradient was proposed"
        norm = float(self._square.sqrt())
        factor = float(clip_factor(self._square.sqrt(), self.dense.clip))
        if not math.isfinite(norm):
            return Commit(norm, 0.0, {}, dropped=f"the gradient's norm is {norm}")
        if norm == 0:
            return Commit(norm, factor, {})
        changed = {}
        try:
            for name in list(self._gradient):
                entries = self.dense._advance(name, self._gradient.pop(name).mul_(factor))
                if len(entries.position_N):
                    changed[name] = entries
        except torch.OutOfMemoryError as error:
            raise cannot_go_on(error) from error
        self.dense.weights.write_(changed)
        return Commit(norm, factor, changed)


def cannot_go_on(error: torch.OutOfMemoryError) -> FrugalError:
    """Memory ran out in an optimizer's step: some of its parameters have moved, and nothing can undo that."""
    return FrugalError(
        f"out of memory in the optimizer's step, and this run cannot go on: {error}; it needs a "
        "smaller model, or learner.kind = sgd, which has no states"
    )


def state_bytes(optimizer: Any) -> int:
    """Of all tensors that an optimizer keeps."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in states if isinstance(value, Tensor))
