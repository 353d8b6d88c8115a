"""From a batch of judged groups to one optimizer step: advantages, the reference, the loss, the learner.

Group: rollouts, judgements, rewards -> advantage -> loss(logprob_BT) -> Learner.step -> Step
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Recipe
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
    device = learner.decoder.device
    width = max(len(r.response_ids) for r in rollouts)
    mask_BT = torch.zeros(len(rollouts), width, dtype=torch.bool)
    sampler_BT = torch.zeros(len(rollouts), width)
    for i, rollout in enumerate(rollouts):
        mask_BT[i, : len(rollout.response_ids)] = True
        sampler_BT[i, : len(rollout.response_ids)] = torch.from_numpy(rollout.policy_logprob_T)
    mask_BT, sampler_BT = mask_BT.to(device), sampler_BT.to(device)
    advantage_B = advantage_B[rows].to(device)
    sequences, tokens = len(everyone), int(length_NG.sum())
    max_tokens = recipe.rollout.max_tokens
    reference_BT = None
    if kl:
        with learner.decoder.weights.base():
            reference_BT = learner.log_probs(rollouts)

    def loss(logprob_BT: Tensor) -> tuple[Tensor, dict[str, float]]:
        old_BT = logprob_BT.detach()  # one step a batch: the old policy is the learner itself
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
            tokens=tokens,
            max_tokens=max_tokens,
            clip_low=recipe.loss.clip_low,
            clip_high=recipe.loss.clip_high,
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
        return value, {**stats, **_sampler_gap(sampler_BT, old_BT, mask_BT)}

    return learner.step(rollouts, loss)


def _sampler_gap(sampler_BT: Tensor, old_BT: Tensor, mask_BT: Tensor) -> dict[str, float]:
    """How far the sampler's log-probabilities are from the learner's: the largest, and k3."""
    gap_N = (old_BT - sampler_BT)[mask_BT]
    k3 = (gap_N.exp() - gap_N - 1).mean()
    return {"sampler_gap_max": float(gap_N.abs().max()), "sampler_gap_k3": float(k3)}
