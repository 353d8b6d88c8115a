"""The learner: full-batch SGD with exact global-norm clipping, one layer's gradient at a time.

With hidden states x_0 = embed(tokens), x_{l+1} = layer_l(x_l), and L a function of the response tokens'
log-probabilities of the whole batch:

1. forward: all micro-batches through layer 0, then all through layer 1, ...; only the x_l at the layer
   boundaries are kept;
2. head: log-probabilities [B, T] of the whole batch, block by block of the vocabulary (see decoder).
   `loss(logprob_BT)` is called ONCE on them, so batch-wide normalisers and sequence-level ratios cost
   nothing, and its gradient g = dL/dlogprob is all that the rest needs. With one step a batch, the old
   policy's log-probabilities are these very numbers;
3. head again with g: dL/dx_L, and dL/dW_head proposed block by block;
4. backward: for l from the top, all micro-batches: recompute layer_l with its weights as leaves,
   accumulate ITS weight gradient in float32, propose it (weights.Transaction), free it;
5. embedding: only rows that occur get a gradient. Where the head is tied, the head's gradient of those
   rows waits for it, so that a row is proposed once, with the sum;
6. commit, or drop the step whole.

The result equals torch.optim.SGD with clip_grad_norm_ on the whole batch up to the order of sums; no
gradient buffer of the model exists at any time. Cost: 8 FLOPs a parameter and token (forward 2, again
in the recomputation 2, backward 4).

Source: layer-wise updates as in LOMO (arXiv 2306.09782). Differs: LOMO updates while it goes back and
needs a second backward pass for the global norm; here nothing is written before the norm is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .decoder import Decoder, HeadState
from .rollout import MicroBatch, Rollout, micro_batches
from .weights import Commit, Transaction

Loss = Callable[[Tensor], tuple[Tensor, Mapping[str, float]]]


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

    `micro_tokens` bounds the padded tokens in a layer at a time. `boundary_on_host` keeps hidden states of
    the whole batch in host memory: the device sees a micro-batch of them at a time. `reference`: another
    model that scores the rollouts where the loss wants one; None: this one with its patch off.
    """

    decoder: Decoder
    lr: float
    clip: float | None
    temperature: float
    micro_tokens: int
    boundary_on_host: bool = False
    reference: Learner | None = None

    def reference_log_probs(self, rollouts: Sequence[Rollout]) -> Tensor:
        """As `log_probs`, of the reference policy."""
        if self.reference is None:
            with self.decoder.weights.base():
                return self.log_probs(rollouts)
        self.decoder.weights.release()  # two models' layers are never on the device at once
        self.reference.micro_tokens = self.micro_tokens
        try:
            return self.reference.log_probs(rollouts)
        finally:
            self.reference.decoder.weights.release()

    def log_probs(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Log-probabilities [B, T] (nats, float32, 0 where padded) of the responses. No gradient."""
        with torch.no_grad():
            batch = _Batch(self.decoder, rollouts, self.micro_tokens)
            hidden = batch.embed(self._place)
            for index in range(len(self.decoder.layers)):
                hidden = self._through(index, batch, hidden)
            state, _ = self._head(batch, hidden)
            return batch.spread(state.logprob_N)

    @property
    def _place(self) -> torch.device:
        """Where hidden states of the whole batch are."""
        return torch.device("cpu") if self.boundary_on_host else self.decoder.device

    def _through(self, index: int, batch: _Batch, states: list[Tensor]) -> list[Tensor]:
        """All micro-batches through one layer."""
        device = self.decoder.device
        with self.decoder.layer(index) as layer:
            return [
                layer(hidden.to(device), **arguments[index]).to(self._place)
                for hidden, arguments in zip(states, batch.arguments, strict=True)
            ]

    def step(self, rollouts: Sequence[Rollout], loss: Loss) -> Step:
        """One optimizer step on the whole batch. Commits it, or leaves the weights as they were.

        `loss` gets log-probabilities [B, T] in the order of `rollouts`, a leaf that requires grad, padded
        with 0 to the longest response, and returns a scalar and numbers to log.
        """
        decoder = self.decoder
        transaction = Transaction(decoder.weights, self.lr, self.clip)
        batch = _Batch(decoder, rollouts, self.micro_tokens)
        boundary: list[list[Tensor]] = []
        with torch.no_grad():
            top = batch.embed(self._place)
            for index in range(len(decoder.layers)):
                boundary.append(top)
                top = self._through(index, batch, top)
            state, normed_ND = self._head(batch, top)
        logprob_BT = batch.spread(state.logprob_N).requires_grad_()
        value, stats = loss(logprob_BT)
        number, entropy = float(value.detach()), float(state.entropy_N.mean())
        if not math.isfinite(number):
            commit = Commit(float("nan"), 0.0, {}, dropped=f"the loss is {number}")
            return Step(commit, number, stats, entropy)
        (gradient_BT,) = torch.autograd.grad(value, logprob_BT)
        with torch.no_grad():
            waiting = _TiedRows(decoder, batch) if decoder.tied else None

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
                take,
            )
            del normed_ND
        slopes = self._norm_backward(batch, top, slope_ND, transaction)
        del top, slope_ND
        for index in reversed(range(len(decoder.layers))):
            self._layer_backward(index, batch, boundary.pop(), slopes, transaction)
        with torch.no_grad():
            row_R, gradient_RD = batch.embedding_gradient(slopes)
            if waiting is not None:
                gradient_RD += waiting.gradient_RD
            transaction.propose(decoder.embed_name, gradient_RD, row_R=row_R)
            return Step(transaction.commit(), number, stats, entropy)

    def _head(self, batch: _Batch, top: list[Tensor]) -> tuple[HeadState, Tensor]:
        """Log-probabilities of all targets, and the normed states [N, D] that predict them."""
        with self.decoder.norm() as norm:
            normed_ND = torch.cat(
                [norm(h.flatten(0, 1)[place_N]) for h, place_N in zip(top, batch.place, strict=True)]
            )
        return self.decoder.log_probs(normed_ND, batch.target_N, self.temperature), normed_ND

    def _norm_backward(
        self, batch: _Batch, top: list[Tensor], slope_ND: Tensor, transaction: Transaction
    ) -> list[Tensor]:
        """dL/dx_L of each micro-batch; proposes the norm's weight."""
        slopes = []
        with self.decoder.norm(learn=True) as norm:
            for hidden, place_N, part in zip(top, batch.place, batch.parts, strict=True):
                here = hidden.to(self.decoder.device)
                state_ND = here.flatten(0, 1)[place_N].requires_grad_()
                torch.autograd.backward(norm(state_ND), slope_ND[part])
                slope = torch.zeros_like(here)
                slope.flatten(0, 1)[place_N] = _gradient_of(state_ND)
                slopes.append(slope.to(self._place))
            (weight,) = norm.parameters()
            transaction.propose(self.decoder.norm_name, _gradient_of(weight).float())
        return slopes

    def _layer_backward(
        self,
        index: int,
        batch: _Batch,
        inputs: list[Tensor],
        slopes: list[Tensor],
        transaction: Transaction,
    ) -> None:
        """Turn `slopes` from dL/dx_{l+1} into dL/dx_l, in place; propose the layer's gradients."""
        device = self.decoder.device
        with self.decoder.layer(index, learn=True) as layer:
            gradients = _accumulate_in_float32(layer)
            for m, arguments in enumerate(batch.arguments):
                hidden = inputs[m].to(device).requires_grad_()
                torch.autograd.backward(layer(hidden, **arguments[index]), slopes[m].to(device))
                # the state is not needed any more
                slopes[m] = inputs[m] = _gradient_of(hidden).to(self._place)
            for target in self.decoder.targets[index]:
                transaction.propose(target.name, gradients.pop(target.parameter))


def _accumulate_in_float32(layer: torch.nn.Module) -> dict[Tensor, Tensor]:
    """Gradients by parameter, summed over micro-batches in float32 as soon as each is computed."""
    total: dict[Tensor, Tensor] = {}

    def add(parameter: Tensor) -> None:
        gradient = _gradient_of(parameter)
        if parameter in total:
            total[parameter] += gradient
        else:
            total[parameter] = gradient.float()
        parameter.grad = None

    for parameter in layer.parameters():
        parameter.register_post_accumulate_grad_hook(add)
    return total


def _gradient_of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None, "no gradient reached this leaf"
    return leaf.grad


class _Batch:
    """Rollouts cut into micro-batches and put on the device, with the way back to [B, T]."""

    def __init__(self, decoder: Decoder, rollouts: Sequence[Rollout], micro_tokens: int) -> None:
        self.decoder = decoder
        device = decoder.device
        self.micro: list[MicroBatch] = micro_batches(rollouts, micro_tokens)
        self.tokens = [torch.from_numpy(m.token_BT).to(device) for m in self.micro]
        self.place = [torch.from_numpy(m.place_N).to(device) for m in self.micro]
        self.target_N = torch.cat([torch.from_numpy(m.target_N) for m in self.micro]).to(device)
        ends = np.cumsum([len(m.place_N) for m in self.micro]).tolist()
        self.parts = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        self.shape = (len(rollouts), max(len(r.response_ids) for r in rollouts))
        flat = [
            row * self.shape[1] + np.arange(len(rollouts[row].response_ids))
            for m in self.micro
            for row in m.row_B
        ]
        self.flat_N = torch.from_numpy(np.concatenate(flat)).to(device)
        self.arguments: list[list[dict]] = []

    def embed(self, place: torch.device) -> list[Tensor]:
        """x_0 of each micro-batch, kept at `place`; also catches the arguments of the layers."""
        states, self.arguments = [], []
        for token_BT in self.tokens:
            hidden = self.decoder.embed(token_BT)
            self.arguments.append(self.decoder.arguments(hidden))
            states.append(hidden.to(place))
        return states

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

    def embedding_gradient(self, slopes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Rows of the embedding that occur, and their gradients in float32."""
        row_R = self.rows()
        width = slopes[0].shape[-1]
        gradient_RD = torch.zeros(len(row_R), width, device=row_R.device)
        for token_BT, slope in zip(self.tokens, slopes, strict=True):
            index_T = torch.searchsorted(row_R, token_BT.view(-1))
            here = slope.to(row_R.device)
            gradient_RD.index_add_(0, index_T, here.reshape(-1, width).float())
        return row_R, gradient_RD


class _TiedRows:
    """Holds back the head's gradient of the rows that the embedding will add to."""

    def __init__(self, decoder: Decoder, batch: _Batch) -> None:
        self.name = decoder.head_name
        self.row_R = batch.rows()
        width = decoder.weights.held[self.name].shape[1]
        self.gradient_RD = torch.zeros(len(self.row_R), width, device=decoder.device)

    def take(self, transaction: Transaction, first_row: int, gradient_RD: Tensor) -> None:
        """Keep the rows of this block that wait, propose the others."""
        stop = first_row + len(gradient_RD)
        waits_R = (self.row_R >= first_row) & (self.row_R < stop)
        local_R = self.row_R[waits_R] - first_row
        self.gradient_RD[waits_R] = gradient_RD[local_R]
        free = torch.ones(len(gradient_RD), dtype=torch.bool, device=self.row_R.device)
        free[local_R] = False
        row_M = torch.nonzero(free).view(-1)
        transaction.propose(self.name, gradient_RD[row_M], row_R=row_M + first_row)
