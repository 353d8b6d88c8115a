"""Advantages and policy losses: pure functions of the whole batch's log-probabilities.

With r_t = pi(o_t) / pi_old(o_t), reward R_i of response i in its group, A its advantage:

    name         advantage               token term                   average            clip
    grpo         (R - mean) / std        min(r A, clip(r) A)          token, response    0.2, 0.2
    dr_grpo      R - mean                the same                     constant length    0.2, 0.2
    dapo         (R - mean) / std        the same                     token              0.2, 0.28
    gspo         (R - mean) / std        the same, with the           token, response    3e-4, 4e-4
                                         response's ratio (below)
    cispo        (R - mean) / std        sg(clip(r)) A log pi         token              none, 4
    rloo         R - mean of the others  A log pi                     response           -
    reinforce++  whitened in the batch   min(r A, clip(r) A)          token              0.2, 0.2

The loss is minus the average of the terms: over the tokens of each response, then over responses;
over all tokens; over responses of a constant length of max_tokens; or over responses, of sums.
GSPO's ratio is the geometric mean over the response, exp(mean_t log r_t), the same at each token.

Invariants:
- A group whose rewards are all equal has advantages of exactly 0 (reinforce++: a batch).
- What the mask leaves out is never read: it may hold NaN.
- Averages divide by counts of the whole rollout batch, which are passed in; a response without
  advantage may be left out of the tensors, and the loss and its gradient stay the same.
- KL (`Algorithm.kl`): "loss" adds `kl_loss`, k3 (Schulman, joschu.net/blog/kl-approx.html),
  averaged as the policy term is; "reward" takes kl * (log pi - log reference) off the reward before
  the baseline (`advantages_with_kl`). With either, no response may be left out.

Source:
- grpo: DeepSeekMath (arXiv 2402.03300) eq. 3. Its std is left open: unbiased and + 1e-6, as in
  volcengine/verl verl/trainer/ppo/core_algos.py compute_grpo_outcome_advantage
  (huggingface/trl trl/trainer/grpo_trainer.py has + 1e-4). Its clip too: 0.2 is theirs.
- dr_grpo: arXiv 2503.20783 section 3; the constant is max_tokens as in its released code and TRL.
- dapo: arXiv 2503.14476 eq. 8-13; buffer 4096 of 20480 tokens, so a fifth.
- gspo: arXiv 2507.18071 eq. 5-7, clip from section 5.1.
- cispo: MiniMax-M1 (arXiv 2506.13585) eq. 4-5, no lower limit as there; its upper limit is not
  given: r <= 5 is from ScaleRL (arXiv 2510.13786), as TRL advises.
- rloo: arXiv 2402.14740: REINFORCE on the whole response, its KL in its reward.
- reinforce++: arXiv 2501.03262v9 eq. 8-10, KL by k1 from the token to the end; statistics over
  tokens with a biased variance of at least 1e-8, as in its authors' code, OpenRLHF/OpenRLHF
  openrlhf/trainer/ppo_utils/experience_maker.py; its average over tokens and clip are theirs.

Differs: log-ratios are clamped to +-20, as in verl and OpenRLHF, so that no ratio overflows. PPO's
dual clip (verl's default) is left out: none of these papers has it. DAPO's and CISPO's "token"
averages are over the batch, as in verl and TRL, where the papers write one group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # nats; exp(20) = 5e8 is far outside every clip
STD_EPSILON = 1e-6  # in units of the reward
LEAST_VARIANCE = 1e-8  # in units of the reward, squared


@dataclass(frozen=True)
class Algorithm:
    """The pieces that make a policy-gradient method; the words are explained in the module's table.

    `clip_low` and `clip_high` limit the ratio to [1 - clip_low, 1 + clip_high]; None: not limited.
    `dynamic_sampling`: groups without signal are sampled anew. `overlong_share`: the last share of
    max_tokens in which `overlong_penalty` grows; None: no penalty.
    """

    advantage: Literal["group_std", "group_mean", "leave_one_out", "batch"]
    term: Literal["clip", "weighted", "plain"]
    average: Literal["response_tokens", "constant_length", "tokens", "response_sums"]
    ratio: Literal["token", "response"] = "token"
    clip_low: float | None = None
    clip_high: float | None = None
    kl: Literal["loss", "reward"] = "loss"
    dynamic_sampling: bool = False
    overlong_share: float | None = None


ALGORITHMS: Mapping[str, Algorithm] = {
    "grpo": Algorithm("group_std", "clip", "response_tokens", clip_low=0.2, clip_high=0.2),
    "dr_grpo": Algorithm("group_mean", "clip", "constant_length", clip_low=0.2, clip_high=0.2),
    "dapo": Algorithm(
        "group_std",
        "clip",
        "tokens",
        clip_low=0.2,
        clip_high=0.28,
        dynamic_sampling=True,
        overlong_share=0.2,
    ),
    "rloo": Algorithm("leave_one_out", "plain", "response_sums", kl="reward"),
    "reinforce++": Algorithm("batch", "clip", "tokens", clip_low=0.2, clip_high=0.2, kl="reward"),
    "gspo": Algorithm(
        "group_std", "clip", "response_tokens", ratio="response", clip_low=3e-4, clip_high=4e-4
    ),
    "cispo": Algorithm("group_std", "weighted", "tokens", clip_high=4.0),
}


def advantages(reward_NG: Tensor, algorithm: Algorithm, length_NG: Tensor) -> Tensor:
    """Advantages [N, G] in float32 of N groups of G responses.

    `length_NG`: response tokens; only "batch" reads it, whose statistics are over tokens.
    """
    reward_NG = reward_NG.double()
    if algorithm.advantage == "batch":
        return _whiten(reward_NG, length_NG.to(reward_NG)).float()
    group = reward_NG.shape[1]
    advantage_NG = reward_NG - reward_NG.mean(1, keepdim=True)
    if algorithm.advantage == "group_std":
        std_N1 = reward_NG.std(1, correction=min(1, group - 1), keepdim=True)
        advantage_NG = advantage_NG / (std_N1 + STD_EPSILON)
    elif algorithm.advantage == "leave_one_out":
        # R - (sum - R) / (G - 1) = (R - mean) G / (G - 1)
        advantage_NG = advantage_NG * (group / max(group - 1, 1))
    equal_N = (reward_NG == reward_NG[:, :1]).all(1)  # the mean of equal floats may round off them
    return advantage_NG.masked_fill(equal_N[:, None], 0.0).float()


def advantages_with_kl(
    reward_NG: Tensor,
    algorithm: Algorithm,
    logprob_BT: Tensor,
    reference_logprob_BT: Tensor,
    mask_BT: Tensor,
    kl: float,
) -> Tensor:
    """Advantages [B, T] in float32 with the KL in the reward; B = N * G, group by group.

    Of reinforce++, a token answers for the KL from itself to the end; of rloo, for the response's.
    """
    assert algorithm.kl == "reward", "this algorithm has its KL in the loss: use kl_loss"
    gap_BT = (logprob_BT.detach() - reference_logprob_BT).masked_fill(~mask_BT, 0.0).double()
    if algorithm.advantage == "batch":
        to_go_BT = gap_BT.flip(1).cumsum(1).flip(1)
        shaped_BT = reward_NG.double().view(-1, 1) - kl * to_go_BT
        return _whiten(shaped_BT, mask_BT.double()).float()
    shaped_NG = reward_NG.double() - kl * gap_BT.sum(1).view(reward_NG.shape)
    advantage_NG = advantages(shaped_NG, algorithm, mask_BT.sum(1).view(reward_NG.shape))
    return advantage_NG.view(-1, 1) * mask_BT


def overlong_penalty(length_tokens: int, max_tokens: int, buffer_tokens: int) -> float:
    """DAPO eq. 13, to be added to the reward: 0 before the buffer, falling to -1 at max_tokens."""
    into_buffer_tokens = length_tokens - (max_tokens - buffer_tokens)
    return -min(max(into_buffer_tokens / buffer_tokens, 0.0), 1.0)


def policy_loss(
    algorithm: Algorithm,
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage: Tensor,
    mask_BT: Tensor,
    *,
    sequences: int,
    tokens: int,
    max_tokens: int,
    clip_low: float | None = None,
    clip_high: float | None = None,
    weight_BT: Tensor | None = None,
    counted_BT: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss (a scalar with gradient to `logprob_BT`) and numbers to log.

    `advantage`: [B] or [B, T]. `mask_BT`: bool, True at response tokens. `sequences`, `tokens`:
    of the whole rollout batch, responses left out of the tensors included. `clip_low`, `clip_high`:
    in place of the algorithm's own. `weight_BT` multiplies the token terms, without gradient.
    `counted_BT`: the tokens of the mask that a response's average divides by, when not all; the others
    add nothing. `tokens` is then a number of counted tokens.

    The numbers, over the tokens of the mask (none if it is empty): mean and largest ratio, learner
    over old, and `clip_share`, where the clip changed the term (for algorithms that clip).
    Syncs: once, for these numbers.
    """
    logprob_BT = logprob_BT.masked_fill(~mask_BT, 0.0)  # first of all: 0 * NaN is NaN
    log_ratio_BT = logprob_BT - old_logprob_BT.masked_fill(~mask_BT, 0.0)
    if algorithm.ratio == "response":
        mean_B1 = log_ratio_BT.sum(1, keepdim=True) / _lengths(mask_BT)[:, None]
        log_ratio_BT = mean_B1.expand_as(log_ratio_BT)
    ratio_BT = log_ratio_BT.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    low = algorithm.clip_low if clip_low is None else clip_low
    high = algorithm.clip_high if clip_high is None else clip_high
    clipped_BT = ratio_BT.clamp(-math.inf if low is None else 1 - low, math.inf if high is None else 1 + high)
    advantage_BT = advantage[:, None] if advantage.ndim == 1 else advantage
    advantage_BT = advantage_BT.expand_as(mask_BT).masked_fill(~mask_BT, 0.0)
    term_BT, touched_BT = _terms(algorithm, logprob_BT, ratio_BT, clipped_BT, advantage_BT)
    if weight_BT is not None:
        term_BT = term_BT * weight_BT.detach().masked_fill(~mask_BT, 0.0)
    counted_BT = mask_BT if counted_BT is None else mask_BT & counted_BT
    term_BT = term_BT.masked_fill(~counted_BT, 0.0)
    loss = -_average(algorithm, term_BT, counted_BT, sequences, tokens, max_tokens)
    return loss, _statistics(ratio_BT.detach(), touched_BT, mask_BT)


def kl_k3(logprob_BT: Tensor, reference_logprob_BT: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(pi, reference) at each token; its gradient is taken as it is."""
    gap_BT = (reference_logprob_BT - logprob_BT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return gap_BT.exp() - gap_BT - 1


def kl_loss(
    algorithm: Algorithm,
    logprob_BT: Tensor,
    reference_logprob_BT: Tensor,
    mask_BT: Tensor,
    *,
    sequences: int,
    tokens: int,
    max_tokens: int,
) -> Tensor:
    """k3 averaged as the algorithm's policy term is; a scalar to be weighted and added to it."""
    assert algorithm.kl == "loss", "this algorithm has its KL in the reward: use advantages_with_kl"
    kl_BT = kl_k3(logprob_BT.masked_fill(~mask_BT, 0.0), reference_logprob_BT.masked_fill(~mask_BT, 0.0))
    return _average(algorithm, kl_BT, mask_BT, sequences, tokens, max_tokens)


def _terms(
    algorithm: Algorithm,
    logprob_BT: Tensor,
    ratio_BT: Tensor,
    clipped_BT: Tensor,
    advantage_BT: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """What each token adds to the objective, and where the clip touched it (None: no clip)."""
    if algorithm.term == "plain":
        return advantage_BT * logprob_BT, None
    if algorithm.term == "weighted":
        return clipped_BT.detach() * advantage_BT * logprob_BT, clipped_BT != ratio_BT
    free_BT, held_BT = ratio_BT * advantage_BT, clipped_BT * advantage_BT
    return torch.minimum(free_BT, held_BT), held_BT < free_BT


def _average(
    algorithm: Algorithm,
    value_BT: Tensor,
    mask_BT: Tensor,
    sequences: int,
    tokens: int,
    max_tokens: int,
) -> Tensor:
    """`value_BT`, 0 where masked, summed over the batch and divided as the algorithm does."""
    match algorithm.average:
        case "response_tokens":
            return (value_BT.sum(1) / _lengths(mask_BT)).sum() / sequences
        case "constant_length":
            return value_BT.sum() / (sequences * max_tokens)
        case "tokens":
            return value_BT.sum() / max(tokens, 1)
        case "response_sums":
            return value_BT.sum() / sequences


def _lengths(mask_BT: Tensor) -> Tensor:
    """Response tokens; at least 1, so that a response with none left adds 0 and not NaN."""
    return mask_BT.sum(1).clamp(min=1)


def _statistics(ratio_BT: Tensor, touched_BT: Tensor | None, mask_BT: Tensor) -> dict[str, float]:
    ratio_N = ratio_BT[mask_BT]
    if not len(ratio_N):
        return {}
    numbers = {"ratio_mean": ratio_N.mean(), "ratio_max": ratio_N.max()}
    if touched_BT is not None:
        numbers["clip_share"] = touched_BT[mask_BT].to(ratio_N).mean()
    return dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True))


def _whiten(value: Tensor, weight: Tensor) -> Tensor:
    """Mean 0 and variance 1 where each entry counts `weight` times; 0 where the weight is 0."""
    counted = weight > 0
    known = value[counted]
    if not len(known) or bool((known == known[0]).all()):
        return torch.zeros_like(value)
    total = weight.sum()
    centred = value - (value * weight).sum() / total
    variance = (centred.square() * weight).sum() / total
    return (centred * variance.clamp(min=LEAST_VARIANCE).rsqrt()).masked_fill(~counted, 0.0)
