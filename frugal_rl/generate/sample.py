"""Drawing a token a slot, and the text that ends a response.

With z the logits of a slot, p = softmax(z / temperature) is the policy. Truncation keeps the tokens

    top-k    that are among the k likeliest (with all that tie with the k-th),
    top-p    of those, in falling order of probability, before which less than top_p has been counted
             (at least the likeliest; of equals the lowest id first),
    min-p    with p >= min_p * max p,

and q = p over the kept tokens, renormalised, is what is drawn from. The token is the inverse of q's
cumulative distribution at the request's own uniform number: nothing depends on the slot. At temperature
0 the token is the arg max, and its log-probabilities are those of temperature 1.

Source: top-p, arXiv 1904.09751; min-p, arXiv 2407.01082; their order is that of transformers' generate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..rollout import Request, Rollout

TRUNCATION_BLOCK_BYTES = 32 << 20  # one of the few copies of the logits that truncation needs at a time
PARTIAL_TOKENS = 4  # tokens that may hold pieces of one character: UTF-8 has up to four bytes


@dataclass(frozen=True)
class Truncation:
    """Which tokens may be drawn; None: that rule is off. `top_p` and `min_p` are in (0, 1]."""

    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    @property
    def keeps_all(self) -> bool:
        return self.top_k is None and self.top_p is None and self.min_p is None


class Sampler(Protocol):
    """Who samples: at most `slots` sequences at a time; `generate` as Engine's."""

    slots: int

    def generate(
        self,
        requests: Sequence[Request],
        *,
        max_tokens: int,
        temperature: float,
        truncation: Truncation = ...,
    ) -> Iterator[tuple[int, Rollout]]: ...


class Drawn(NamedTuple):
    """A token a slot, its log-probability (nats) under q, and under p (see the module)."""

    token_S: Tensor
    logprob_S: Tensor
    policy_logprob_S: Tensor


def draw(logit_SV: Tensor, uniform_S: Tensor, temperature: float, truncation: Truncation) -> Drawn:
    """Shapes: logit_SV float32, uniform_S in [0, 1). No sync."""
    if temperature == 0:
        logprob_SV = torch.log_softmax(logit_SV, dim=-1)
        token_S = logit_SV.argmax(dim=-1)
    else:
        logprob_SV = torch.log_softmax(logit_SV / temperature, dim=-1)
        if not truncation.keeps_all:
            return _draw_truncated(logprob_SV, uniform_S, truncation)
        token_S = inverse_cdf(logprob_SV, uniform_S)
    logprob_S = _pick(logprob_SV, token_S)
    return Drawn(token_S, logprob_S, logprob_S)


def _draw_truncated(logprob_SV: Tensor, uniform_S: Tensor, truncation: Truncation) -> Drawn:
    """By blocks of slots."""
    rows = max(1, TRUNCATION_BLOCK_BYTES // (logprob_SV.shape[1] * 4))
    parts = []
    for policy_SV, number_S in zip(logprob_SV.split(rows), uniform_S.split(rows), strict=True):
        drawn_SV = torch.log_softmax(truncate(policy_SV, truncation), dim=-1)
        token_S = inverse_cdf(drawn_SV, number_S)
        parts.append(Drawn(token_S, _pick(drawn_SV, token_S), _pick(policy_SV, token_S)))
    return Drawn(*(torch.cat(column) for column in zip(*parts, strict=True)))


def truncate(logprob_SV: Tensor, truncation: Truncation) -> Tensor:
    """The log-probabilities with -inf for tokens that may not be drawn; not renormalised."""
    out_SV = logprob_SV
    if truncation.top_k is not None:
        least_S1 = out_SV.topk(min(truncation.top_k, out_SV.shape[1]), dim=-1).values[:, -1:]
        out_SV = out_SV.masked_fill(out_SV < least_S1, float("-inf"))
    if truncation.top_p is not None:
        falling_SV, order_SV = torch.softmax(out_SV, dim=-1).sort(dim=-1, descending=True, stable=True)
        before_SV = running_sum_(falling_SV.clone()) - falling_SV
        out_of_p_SV = before_SV >= truncation.top_p
        out_SV = out_SV.masked_fill(out_of_p_SV.scatter(1, order_SV, out_of_p_SV), float("-inf"))
    if truncation.min_p is not None:
        ratio_SV = (logprob_SV - logprob_SV.max(dim=-1, keepdim=True).values).exp()
        out_SV = out_SV.masked_fill(ratio_SV < truncation.min_p, float("-inf"))
    return out_SV


def running_sum_(probability_SV: Tensor) -> Tensor:
    """Sums that never fall, and do not rise where a probability is 0. In place, but in float64.

    A GPU adds up each of several rows as one tree, but a row alone in pieces that are rounded apart and meet
    in any order (torch's ScanUtils.cuh): in float64 then, so that this decides about no token.
    """
    alone = probability_SV.is_cuda and len(probability_SV) == 1
    return (probability_SV.double() if alone else probability_SV).cumsum_(dim=-1)


def inverse_cdf(logprob_SV: Tensor, uniform_S: Tensor) -> Tensor:
    """The token at which the cumulative probability first exceeds uniform * total."""
    cumulative_SV = running_sum_(logprob_SV.exp())
    threshold_S = uniform_S * cumulative_SV[:, -1]
    # rounding may lift the product to the total itself: stay below it
    below_S = torch.nextafter(cumulative_SV[:, -1], torch.zeros_like(threshold_S))
    threshold_S = torch.minimum(threshold_S, below_S)
    token_S = torch.searchsorted(cumulative_SV, threshold_S[:, None], right=True)[:, 0]
    return token_S.clamp(max=logprob_SV.shape[1] - 1)  # logits that are not finite find no token


def _pick(value_SV: Tensor, token_S: Tensor) -> Tensor:
    return value_SV.gather(1, token_S[:, None])[:, 0]


@dataclass(frozen=True)
class StopText:
    """Strings that end a response, looked for in what `decode` makes of its tokens.

    `decode` must leave out no token: special tokens are text here, and each token at least one byte.
    """

    strings: tuple[str, ...]
    decode: Callable[[Sequence[int]], str]

    @property
    def overlap_tokens(self) -> int:
        """So many tokens before a new one may hold the beginning of a stop string that it completes."""
        return max(len(s.encode()) for s in self.strings) + PARTIAL_TOKENS

    def end(self, ids: Sequence[int], seen: int) -> int | None:
        """How many of `ids` it takes to complete a stop string, the first `seen` being known not to."""
        if not self._in(ids):
            return None
        return next((n for n in range(seen + 1, len(ids) + 1) if self._in(ids[:n])), None)

    def _in(self, ids: Sequence[int]) -> bool:
        text = self.decode(ids)
        return any(string in text for string in self.strings)
