"""The learner: full-batch SGD with exact global-norm clipping, one layer's gradient at a time.

With hidden states x_0 = embed(tokens), x_{l+1} = layer_l(x_l), and L a function of the response tokens'
log-probabilities of the whole batch:

1. forward: all micro-batches through layer 0, then all through layer 1, ...; only the x_l at every k-th
   layer boundary are kept (`boundary_every`);
2. head: log-probabilities [B, T] of the whole batch, block by block of the vocabulary (see decoder).
   `loss(logprob_BT)` is called ONCE on them, so batch-wide normalisers and sequence-level ratios cost
   nothing, and its gradient g = dL/dlogprob is all that the rest needs. With one step a batch, the old
   policy's log-probabilities are these very numbers;
3. head again with g: dL/dx_L, and dL/dW_head proposed block by block;
4. backward: each group of k layers, from the top, is cut into runs of j layers (`layers_together`); the x_l
   at their starts are computed anew from the kept one, by the same operations and so to the same bits; then
   for each run from the group's top, all micro-batches: recompute its layers with their weights as leaves,
   accumulate THEIR weight gradients in float32, propose them (weights.Transaction), free them;
5. embedding: only rows that occur get a gradient. Where the head is tied, the head's gradient of those
   rows waits for it, so that a row is proposed once, with the sum;
6. commit, or drop the step whole.

The result equals torch.optim.SGD with clip_grad_norm_ on the whole batch up to the order of sums; no
gradient buffer of the model exists at any time. Cost: 8 FLOPs a parameter and token (forward 2, again
in the recomputation 2, backward 4), and another 2 (k - j) / k; of the L + 1 hidden states of the whole
batch about L / k + k / j are alive (memory.live_states), and j layers' gradients. k = j > 1 costs nothing
but these.

Source: layer-wise updates as in LOMO (arXiv 2306.09782). Differs: LOMO updates while it goes back and
needs a second backward pass for the global norm; here nothing is written before the norm is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .decoder import Decoder, HeadState, add_product_
from .rollout import MicroBatch, Rollout, micro_batches
from .transit import Transit
from .weights import Commit, Transaction

# of attention: those whose backward pass can be made repeatable
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

Loss = Callable[[Tensor], tuple[Tensor, Mapping[str, float]]]


class Update(Protocol):
    """What one step's gradients go to: see weights.Transaction, whose law of commit holds for all."""

    def propose(
        self, name: str, gradient: Tensor, *, first_row: int = 0, row_R: Tensor | None = None
    ) -> None: ...

    def commit(self) -> Commit: ...


class Baseline(Protocol):
    """Another way to learn from the same gradients than plain SGD.

    `frozen`: the weights get no gradient; what is trained are modules inside the layers.
    """

    frozen: bool

    def begin(self) -> Update: ...

    def off(self) -> AbstractContextManager[None]:
        """While the reference policy is wanted."""
        ...


@dataclass(frozen=True)
class Step:
    """What one optimizer step did: the commit, the loss and its statistics, mean entropy (nats)."""

    commit: Commit
    loss: float
    stats: Mapping[str, float]
    entropy: float


@dataclass
class Learner:
    """SGD on `decoder`'s weights.

    `micro_tokens` bounds the padded tokens in a layer at a time. `boundary_every`: of the hidden states at
    layer boundaries, those of every so many layers are kept; `layers_together` go backward in one graph, of
    layers whose weights are not streamed. The results have the same bits.
    `boundary_on_host` keeps hidden states of the whole batch in host memory (page-locked if the device is a
    GPU): the device sees a micro-batch of them at a time. `reference`: another model that scores the
    rollouts where the loss wants one; None: this one with its patch off. `baseline`: what learns from the
    gradients in the place of plain SGD.
    """

    decoder: Decoder
    lr: float
    clip: float | None
    temperature: float
    micro_tokens: int
    boundary_every: int = 1
    boundary_on_host: bool = False
    reference: Learner | None = None
    layers_together: int = 1
    baseline: Baseline | None = None

    def __post_init__(self) -> None:
        if self.layers_together > 1 and self.decoder.weights.streams:
            raise ValueError("streamed layers go backward one at a time")
        self._transit = Transit(self.decoder.device, self.boundary_on_host)
        if self.reference is not None and self.reference.boundary_on_host == self.boundary_on_host:
            self.reference._transit = self._transit  # never at once: one place in the host's memory for both

    @property
    def _frozen(self) -> bool:
        return self.baseline is not None and self.baseline.frozen

    def reference_log_probs(self, rollouts: Sequence[Rollout]) -> Tensor:
        """As `log_probs`, of the reference policy."""
        if self.reference is None:
            with self.baseline.off() if self.baseline else self.decoder.weights.base():
                return self.log_probs(rollouts)
        self.decoder.weights.release()  # two models' layers are never on the device at once
        self.reference.micro_tokens = self.micro_tokens
        try:
            return self.reference.log_probs(rollouts)
        finally:
            self.reference.decoder.weights.release()

    def log_probs(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Log-probabilities [B, T] (nats, float32, 0 where padded) of the responses. No gradient."""
        with torch.no_grad(), self._transit:
            batch = _Batch(self.decoder, rollouts, self.micro_tokens)
            states = self._embed(batch)
            for index in range(len(self.decoder.layers)):
                self._through(index, batch, states)
            state, _ = self._head(batch, states)
            return batch.spread(state.logprob_N)

    def release(self) -> None:
        """Give the host memory back in which states are kept from step to step."""
        self._transit.release()

    def _away(self, state: Tensor) -> Tensor:
        """A hidden state, to where those of the whole batch are kept."""
        return self._transit.away(state)

    def _embed(self, batch: _Batch) -> list[Tensor]:
        """x_0 of each micro-batch."""
        return [self._away(hidden) for hidden in batch.embed()]

    def _through(self, index: int, batch: _Batch, states: list[Tensor]) -> None:
        """All micro-batches through one layer, each in the place of its input."""
        with self.decoder.layer(index) as layer, repeatable(self.decoder.device):
            for m, here in enumerate(self._transit.arriving(states)):
                states[m] = self._away(layer(here, **batch.arguments_of(m, index)))

    def step(self, rollouts: Sequence[Rollout], loss: Loss) -> Step:
        """One optimizer step on the whole batch. Commits it, or leaves the weights as they were.

        `loss` gets log-probabilities [B, T] in the order of `rollouts`, a leaf that requires grad, padded
        with 0 to the longest response, and returns a scalar and numbers to log.
        """
        with self._transit:
            return self._step(rollouts, loss)

    def _step(self, rollouts: Sequence[Rollout], loss: Loss) -> Step:
        decoder = self.decoder
        transaction: Update = (
            self.baseline.begin() if self.baseline else Transaction(decoder.weights, self.lr, self.clip)
        )
        batch = _Batch(decoder, rollouts, self.micro_tokens)
        layers, every = len(decoder.layers), self.boundary_every
        boundary: list[list[Tensor]] = []
        with torch.no_grad():
            states = self._embed(batch)
            for index in range(layers):
                if index % every == 0:
                    boundary.append(list(states))
                self._through(index, batch, states)
            state, normed_ND = self._head(batch, states)
        logprob_BT = batch.spread(state.logprob_N).requires_grad_()
        value, stats = loss(logprob_BT)
        number, entropy = float(value.detach()), float(state.entropy_N.mean())
        if not math.isfinite(number):
            commit = Commit(float("nan"), 0.0, {}, dropped=f"the loss is {number}")
            return Step(commit, number, stats, entropy)
        (gradient_BT,) = torch.autograd.grad(value, logprob_BT)
        with torch.no_grad():
            waiting = _TiedRows(decoder, batch) if decoder.tied and not self._frozen else None

            def take(first_row: int, gradient_RD: Tensor) -> None:
                if waiting is None:
                    transaction.propose(decoder.head_name, gradient_RD, first_row=first_row)
                else:
                    waiting.take(transaction, first_row, gradient_RD)

            slope_ND = decoder.head_gradients(
                normed_ND,
                batch.target_N,
                state.normaliser_N,
                batch.gather(gradient_BT),
                self.temperature,
                None if self._frozen else take,
            )
            del normed_ND
        self._norm_backward(batch, states, slope_ND, transaction)
        del slope_ND
        for first in reversed(range(0, layers, every)):
            group = range(first, min(first + every, layers))
            runs = [group[i : i + self.layers_together] for i in range(0, len(group), self.layers_together)]
            inputs = self._inputs_of(runs, batch, boundary.pop())
            for run in reversed(runs):
                self._backward(run, batch, inputs.pop(), states, transaction)
        with torch.no_grad():
            if not self._frozen:
                row_R, gradient_RD = batch.embedding_gradient(self._transit.arriving(states))
                if waiting is not None:
                    gradient_RD += waiting.gradient_RD
                transaction.propose(decoder.embed_name, gradient_RD, row_R=row_R)
            return Step(transaction.commit(), number, stats, entropy)

    def _head(self, batch: _Batch, top: list[Tensor]) -> tuple[HeadState, Tensor]:
        """Log-probabilities of all targets, and the normed states [N, D] that predict them."""
        with self.decoder.norm() as norm:
            normed_ND = torch.cat(
                [
                    norm(hidden.flatten(0, 1)[place_N])
                    for hidden, place_N in zip(self._transit.arriving(top), batch.place, strict=True)
                ]
            )
        return self.decoder.log_probs(normed_ND, batch.target_N, self.temperature), normed_ND

    def _norm_backward(
        self, batch: _Batch, states: list[Tensor], slope_ND: Tensor, transaction: Update
    ) -> None:
        """Turn `states` from x_L into dL/dx_L, in place; propose the norm's weight."""
        learn = not self._frozen
        with (
            self.decoder.norm(learn=learn) as norm,
            _accumulate_in_float32([norm] if learn else []) as gradients,
        ):
            arriving = zip(batch.place, batch.parts, self._transit.arriving(states), strict=True)
            for m, (place_N, part, here) in enumerate(arriving):
                state_ND = here.flatten(0, 1)[place_N].requires_grad_()
                torch.autograd.backward(norm(state_ND), slope_ND[part])
                slope = torch.zeros_like(here)
                own_ND = _gradient_of(state_ND)
                for turn in batch.micro[m].turns:  # sums in one order, whatever the device
                    slope.flatten(0, 1)[place_N[turn]] += own_ND[turn]
                states[m] = self._away(slope)
            if learn:
                (weight,) = norm.parameters()
                transaction.propose(self.decoder.norm_name, gradients.pop(weight))

    def _inputs_of(self, runs: list[range], batch: _Batch, states: list[Tensor]) -> list[list[Tensor]]:
        """x_l at the start of each run of a group from that of its first; `states` is used up."""
        inputs = [list(states)]
        with torch.no_grad():
            for run in runs[:-1]:
                for index in run:
                    self._through(index, batch, states)
                inputs.append(list(states))
        return inputs

    def _backward(
        self,
        run: range,
        batch: _Batch,
        inputs: list[Tensor],
        slopes: list[Tensor],
        transaction: Update,
    ) -> None:
        """Turn `slopes` from dL/dx_{l+1} of a run's last layer into dL/dx_l of its first, in place.

        Proposes the layers' gradients, the last one's first.
        """
        learn = not self._frozen
        with ExitStack() as stack:
            layers = [
                stack.enter_context(self.decoder.layer(index, learn=learn, place=place))
                for place, index in enumerate(run)
            ]
            gradients = stack.enter_context(_accumulate_in_float32(layers)) if learn else {}
            with repeatable(self.decoder.device):
                arriving = zip(self._transit.arriving(inputs), self._transit.arriving(slopes), strict=True)
                for m, (here, slope) in enumerate(arriving):
                    first = hidden = here.detach().requires_grad_()
                    for index, layer in zip(run, layers, strict=True):
                        hidden = layer(hidden, **batch.arguments_of(m, index))
                    torch.autograd.backward(hidden, slope)
                    # the state is not needed any more
                    slopes[m] = inputs[m] = self._away(_gradient_of(first))
            for index in reversed(run) if learn else ():
                for target in self.decoder.targets[index]:
                    transaction.propose(target.name, gradients.pop(target.parameter))


@contextmanager
def _accumulate_in_float32(layers: Sequence[nn.Module]) -> Iterator[dict[Tensor, Tensor]]:
    """Gradients by parameter, summed over micro-batches in float32 as soon as each is computed.

    Those of linear layers of a lower precision are summed from the products on (_Linear), so they are
    nowhere rounded to that precision, and no copy in it exists.
    """
    total: dict[Tensor, Tensor] = {}
    linear = [
        module
        for layer in layers
        for module in layer.modules()
        if isinstance(module, nn.Linear) and module.weight.dtype != torch.float32
    ]

    def add(parameter: Tensor) -> None:
        gradient = _gradient_of(parameter)
        if parameter in total:
            total[parameter] += gradient
        else:
            total[parameter] = gradient.float()
        parameter.grad = None

    for layer in layers:
        for parameter in layer.parameters():
            parameter.register_post_accumulate_grad_hook(add)
    for module in linear:
        module.forward = partial(_linear, module, total)  # type: ignore[method-assign]
    try:
        yield total
    finally:
        for module in linear:
            del module.forward  # the class's own again


def _linear(module: nn.Linear, total: dict[Tensor, Tensor], hidden: Tensor) -> Tensor:
    return _Linear.apply(hidden, module, total)


class _Linear(torch.autograd.Function):
    """A linear layer; the gradients of its weight and bias are added to `total`, in float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, module: nn.Linear, total: dict[Tensor, Tensor]) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.module, ctx.total = module, total
        return nn.functional.linear(hidden, module.weight, module.bias)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        (hidden,), weight, bias = ctx.saved_tensors, ctx.module.weight, ctx.module.bias
        slope_NO, hidden_NI = slope.flatten(0, -2), hidden.flatten(0, -2)
        for parameter in (weight, bias):
            if parameter is not None and parameter not in ctx.total:
                ctx.total[parameter] = torch.zeros(parameter.shape, device=slope.device)
        add_product_(ctx.total[weight], slope_NO.T, hidden_NI)
        if bias is not None:
            ctx.total[bias] += slope_NO.sum(0, dtype=torch.float32)
        return slope @ weight, None, None


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """On a GPU, every kernel inside gives the same bits in every run: sums are not in the order of arrival.

    Concerns the backward pass of attention, of which cuDNN has no such form, and sums over equal indices.
    Products as decoder.let_products_repeat says.
    """
    if device.type != "cuda":
        yield
        return
    settings: Any = torch.utils.deterministic
    wanted = torch.are_deterministic_algorithms_enabled()
    fill, warn = settings.fill_uninitialized_memory, torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False
    try:
        with sdpa_kernel(BACKENDS):
            yield
    finally:
        torch.use_deterministic_algorithms(wanted, warn_only=warn)
        settings.fill_uninitialized_memory = fill


def _gradient_of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None, "no gradient reached this leaf"
    return leaf.grad


class _Batch:
    """Rollouts cut into micro-batches and put on the device, with the way back to [B, T]."""

    def __init__(self, decoder: Decoder, rollouts: Sequence[Rollout], micro_tokens: int) -> None:
        self.decoder = decoder
        device = decoder.device
        self.micro: list[MicroBatch] = micro_batches(rollouts, micro_tokens, decoder.pair_cost)
        self.tokens = [torch.from_numpy(m.token_BT).to(device) for m in self.micro]
        self.place = [torch.from_numpy(m.place_N).to(device) for m in self.micro]
        self.target_N = torch.cat([torch.from_numpy(m.target_N) for m in self.micro]).to(device)
        ends = np.cumsum([len(m.place_N) for m in self.micro]).tolist()
        self.parts = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        self.shape = (len(rollouts), max(len(r.response_ids) for r in rollouts))
        flat = [
            row * self.shape[1] + np.arange(len(rollouts[row].response_ids))
            for m in self.micro
            for row in m.row_R
        ]
        self.flat_N = torch.from_numpy(np.concatenate(flat)).to(device)
        self.segments, self.positions = (
            [None if value is None else torch.from_numpy(value).to(device) for value in values]
            for values in ([m.segment_BT for m in self.micro], [m.position_BT for m in self.micro])
        )
        self._arguments: list[list[dict[str, Any]]] = []
        self._mask: tuple[int, Tensor] | None = None  # of the micro-batch that was last run

    def embed(self) -> Iterator[Tensor]:
        """x_0 of each micro-batch in turn; also catches the arguments of the layers."""
        self._arguments = []
        for token_BT, position_BT in zip(self.tokens, self.positions, strict=True):
            hidden = self.decoder.embed(token_BT)
            self._arguments.append(self.decoder.arguments(hidden, position_BT))
            yield hidden

    def arguments_of(self, m: int, index: int) -> dict[str, Any]:
        """What layer `index` is called with besides the hidden states of micro-batch m."""
        segment_BT = self.segments[m]
        if segment_BT is None:
            return self._arguments[m][index]
        if self._mask is None or self._mask[0] != m:
            place_T = torch.arange(segment_BT.shape[1], device=segment_BT.device)
            seen_BTT = (segment_BT[:, None] == 0) | (segment_BT[:, None] == segment_BT[:, :, None])
            self._mask = m, (seen_BTT & (place_T <= place_T[:, None]))[:, None]
        return {**self._arguments[m][index], "slot_mask": self._mask[1]}

    def spread(self, value_N: Tensor) -> Tensor:
        """[N] in the order of the micro-batches to [B, T] in the order of the rollouts."""
        out = torch.zeros(self.shape, device=value_N.device)
        out.view(-1)[self.flat_N] = value_N
        return out

    def gather(self, value_BT: Tensor) -> Tensor:
        """Inverse of `spread`."""
        return value_BT.reshape(-1)[self.flat_N]

    def rows(self) -> Tensor:
        """Token ids that occur, ascending."""
        return torch.unique(torch.cat([t.view(-1) for t in self.tokens]))

    def embedding_gradient(self, slopes: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Rows of the embedding that occur, and their gradients in float32."""
        row_R = self.rows()
        width = self.decoder.weights.held[self.decoder.embed_name].shape[1]
        gradient_RD = torch.zeros(len(row_R), width, device=row_R.device)
        for token_BT, slope in zip(self.tokens, slopes, strict=True):
            index_T = torch.searchsorted(row_R, token_BT.view(-1))
            with repeatable(row_R.device):
                gradient_RD.index_add_(0, index_T, slope.reshape(-1, width).float())
        return row_R, gradient_RD


class _TiedRows:
    """Holds back the head's gradient of the rows that the embedding will add to."""

    def __init__(self, decoder: Decoder, batch: _Batch) -> None:
        self.name = decoder.head_name
        self.row_R = batch.rows()
        width = decoder.weights.held[self.name].shape[1]
        self.gradient_RD = torch.zeros(len(self.row_R), width, device=decoder.device)

    def take(self, transaction: Update, first_row: int, gradient_RD: Tensor) -> None:
        """Keep the rows of this block that wait, propose the others."""
        stop = first_row + len(gradient_RD)
        waits_R = (self.row_R >= first_row) & (self.row_R < stop)
        local_R = self.row_R[waits_R] - first_row
        self.gradient_RD[waits_R] = gradient_RD[local_R]
        free = torch.ones(len(gradient_RD), dtype=torch.bool, device=self.row_R.device)
        free[local_R] = False
        row_M = torch.nonzero(free).view(-1)
        transaction.propose(self.name, gradient_RD[row_M], row_R=row_M + first_row)
