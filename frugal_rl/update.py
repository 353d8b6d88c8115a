"""From a batch of judged groups to one optimizer step: advantages, the reference, the loss, the learner.

    Group: rollouts, judgements, rewards -> advantage -> loss(logprob_BT) -> Learner.step -> Step

The old policy is the learner's own before the step, dense; the sampler's log-probabilities came with
the rollouts. What is between the two is corrected (correct.py), and watched: where the sampler had its
whole context, the two are one policy and agree up to rounding. If they do not, the sampler ran on
other weights, and the run stops with this step not taken.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Recipe, correction_name, whole_tokens
from .correct import PRESETS, correct, mean_gap, usual_gap
from .errors import FrugalError
from .learn import Learner, Step
from .loss import ALGORITHMS, advantages, advantages_with_kl, kl_loss, policy_loss
from .problems import Problem
from .reward import Judgement
from .rollout import Rollout

HALVINGS = 3  # of the micro-batch, when memory runs out


@dataclass(frozen=True)
class Group:
    """One problem's rollouts and what they earned."""

    problem: Problem
    rollouts: list[Rollout]
    judgements: list[Judgement]
    rewards: list[float]

    @property
    def has_signal(self) -> bool:
        """By what the verifier paid: a difference in length alone is no signal (DAPO)."""
        paid = [judgement.reward for judgement in self.judgements]
        return max(paid) > min(paid)


def learn_within_memory(
    learner: Learner, recipe: Recipe, groups: Sequence[Group], say: Callable[[str], None]
) -> Step | None:
    """`learn`; when memory runs out in the middle, again with smaller micro-batches, which later steps keep.

    A step is a transaction, so nothing of the failed try is left. Raises FrugalError after HALVINGS.
    """
    for halving in range(HALVINGS + 1):
        try:
            return learn(learner, recipe, groups)
        except torch.OutOfMemoryError as error:
            if halving == HALVINGS or learner.micro_tokens == 1:
                raise FrugalError(
                    f"out of memory with micro-batches of {learner.micro_tokens} tokens: {error}; take "
                    "fewer samples or max_tokens, or a smaller memory.budget than the device has"
                ) from error
        learner.micro_tokens = max(1, learner.micro_tokens // 2)
        say(f"out of memory: the step is run again with micro-batches of {learner.micro_tokens} tokens")
        gc.collect()
        if learner.decoder.device.type == "cuda":
            torch.cuda.empty_cache()
    raise AssertionError("unreachable")


def learn(learner: Learner, recipe: Recipe, groups: Sequence[Group]) -> Step | None:
    """One optimizer step on the groups; None when no rollout has an advantage."""
    algorithm = ALGORITHMS[recipe.loss.algorithm]
    everyone = [r for g in groups for r in g.rollouts]
    reward_NG = torch.tensor([g.rewards for g in groups], dtype=torch.float32)
    length_NG = torch.tensor([[len(r.response_ids) for r in g.rollouts] for g in groups])
    advantage_B = advantages(reward_NG, algorithm, length_NG).view(-1)
    kl = recipe.loss.kl
    # without a KL term, what has no advantage has no gradient: the counts below still include it
    rows = torch.arange(len(everyone)) if kl else torch.nonzero(advantage_B).view(-1)
    if not len(rows):
        return None
    rollouts = [everyone[i] for i in rows.tolist()]
    device, preset = learner.decoder.device, correction_name(recipe)
    width = max(len(r.response_ids) for r in rollouts)
    # a correction is the whole batch's: its means are, and the share that it leaves out
    seen, place_B = (rollouts, torch.arange(len(rows))) if preset == "off" else (everyone, rows)
    sampled = _Sampled.of(seen, whole_tokens(recipe), device)
    dense_BT = _old_of_others(learner, seen, place_B, sampled)
    place_B = place_B.to(device)
    mask_BT = sampled.mask_BT[place_B, :width]
    advantage_B = advantage_B[rows].to(device)
    sequences, tokens = len(everyone), int(length_NG.sum())
    max_tokens = recipe.rollout.max_tokens
    reference_BT = None
    if kl:
        with learner.decoder.weights.base():
            reference_BT = learner.log_probs(rollouts)

    def loss(logprob_BT: Tensor) -> tuple[Tensor, dict[str, float]]:
        old_BT = logprob_BT.detach()  # one step a batch: the old policy is the learner itself
        dense_BT[place_B, :width] = old_BT
        gap = _checked_gap(learner, recipe, dense_BT, sampled)
        corrected = correct(PRESETS[preset], dense_BT, sampled.sampler_BT, sampled.mask_BT)
        advantage = advantage_B
        if reference_BT is not None and algorithm.kl == "reward":
            advantage = advantages_with_kl(reward_NG.to(device), algorithm, old_BT, reference_BT, mask_BT, kl)
        value, stats = policy_loss(
            algorithm,
            logprob_BT,
            old_BT,
            advantage,
            mask_BT,
            sequences=sequences,
            tokens=tokens - int((sampled.mask_BT & ~corrected.counted_BT).sum()),
            max_tokens=max_tokens,
            clip_low=recipe.loss.clip_low,
            clip_high=recipe.loss.clip_high,
            weight_BT=corrected.weight_BT[place_B, :width],
            counted_BT=corrected.counted_BT[place_B, :width],
        )
        if reference_BT is not None and algorithm.kl == "loss":
            penalty = kl_loss(
                algorithm,
                logprob_BT,
                reference_BT,
                mask_BT,
                sequences=sequences,
                tokens=tokens,
                max_tokens=max_tokens,
            )
            value = value + kl * penalty
            stats = {**stats, "kl": float(penalty.detach())}
        return value, {**stats, **corrected.stats, **gap}

    return learner.step(rollouts, loss)


@dataclass(frozen=True)
class _Sampled:
    """Rollouts as the sampler drew them, right-padded: which tokens there are, and their log-probabilities.

    `whole_BT`: tokens of the mask that were drawn with the whole context in the cache.
    """

    mask_BT: Tensor
    sampler_BT: Tensor
    whole_BT: Tensor

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], whole: int | None, device: torch.device) -> _Sampled:
        """`whole`: tokens of context up to which all of it is in the cache; None: however many."""
        width = max(len(r.response_ids) for r in rollouts)
        mask_BT = torch.zeros(len(rollouts), width, dtype=torch.bool)
        whole_BT = torch.zeros_like(mask_BT)
        sampler_BT = torch.zeros(len(rollouts), width)
        for i, rollout in enumerate(rollouts):
            length = len(rollout.response_ids)
            mask_BT[i, :length] = True
            sampler_BT[i, :length] = torch.from_numpy(rollout.logprob_T)
            # token t is drawn from the prompt and the t tokens before it
            fits = length if whole is None else whole - len(rollout.prompt_ids) + 1
            whole_BT[i, : min(length, max(0, fits))] = True
        return cls(mask_BT.to(device), sampler_BT.to(device), whole_BT.to(device))


def _old_of_others(
    learner: Learner, rollouts: Sequence[Rollout], place_B: Tensor, sampled: _Sampled
) -> Tensor:
    """Old log-probabilities [B, T] of the rollouts that are not learned from; 0 at `place_B`."""
    old_BT = torch.zeros_like(sampled.sampler_BT)
    learned = set(place_B.tolist())
    rest = [i for i in range(len(rollouts)) if i not in learned]
    if rest:
        rest_BT = learner.log_probs([rollouts[i] for i in rest])
        old_BT[torch.tensor(rest, device=old_BT.device), : rest_BT.shape[1]] = rest_BT
    return old_BT


def _checked_gap(learner: Learner, recipe: Recipe, old_BT: Tensor, sampled: _Sampled) -> dict[str, float]:
    """`sampler_gap`, the mean |log xi| where the sampler saw all (no number if it nowhere did).

    Raises FrugalError beyond the limit. A gap that is not finite is left to the step, which is dropped.
    """
    gap = mean_gap(old_BT, sampled.sampler_BT, sampled.whole_BT)
    if gap is None:
        return {}
    limit = recipe.loss.max_gap or usual_gap(learner.decoder.dtype)
    if limit < gap < math.inf:
        raise FrugalError(
            f"the sampler is not the policy that learns: where it had its whole context, their "
            f"log-probabilities are {gap:.2g} nats a token apart on average, and loss.max_gap is {limit:.2g} "
            f"({int(sampled.whole_BT.sum())} tokens compared). Likely: the sampler runs on stale or other "
            "weights, or at another temperature than the learner, or its arithmetic is coarser. "
            "The step was not taken. If this much is meant, set loss.max_gap above it"
        )
    return {"sampler_gap": gap}
