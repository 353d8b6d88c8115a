"""From a batch of judged groups to one optimizer step: advantages, the reference, the loss, the learner.

    Group: rollouts, judgements, rewards -> advantage -> loss(logprob_BT) -> Learner.step -> Step

The old policy is the learner's own before the step, dense; the sampler's log-probabilities came with
the rollouts. What is between the two is corrected (correct.py), and watched: where the sampler had its
whole context, the two are one policy and agree up to rounding. If they do not, the sampler ran on
other weights, and the run stops with this step not taken.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import Recipe, correction_name, whole_tokens
from .correct import PRESETS, Corrected, Correction, correct, mean_gap, usual_gap
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
    sampled = _Sampled.of(learner, recipe, everyone, rows)
    mask_BT = sampled.learned(sampled.mask_AT)
    advantage_B = advantage_B[rows].to(device)
    sequences, tokens = len(everyone), int(length_NG.sum())
    max_tokens = recipe.rollout.max_tokens
    reference_BT = None
    if kl:
        reference_BT = learner.reference_log_probs(rollouts)

    def loss(logprob_BT: Tensor) -> tuple[Tensor, dict[str, float]]:
        old_BT = logprob_BT.detach()  # one step a batch: the old policy is the learner itself
        corrected = sampled.corrected(old_BT)
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
            tokens=tokens - int((sampled.mask_AT & ~corrected.counted_BT).sum()),
            max_tokens=max_tokens,
            clip_low=recipe.loss.clip_low,
            clip_high=recipe.loss.clip_high,
            weight_BT=sampled.learned(corrected.weight_BT),
            counted_BT=sampled.learned(corrected.counted_BT),
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
        return value, {**stats, **corrected.stats}

    return learner.step(rollouts, loss)


@dataclass(frozen=True)
class _Sampled:
    """Rollouts as the sampler drew them, beside the old policy's log-probabilities; A rows, right-padded.

    With a correction these are all rollouts of the batch: its means are theirs, and the share that it
    leaves out. Without one, those that are learned from. `row_B`: the places of the latter; `old_AT` is
    known of the others, and 0 there. `whole_AT`: tokens drawn with the whole context in the cache. `limit`:
    of `sampler_gap`, nats.
    """

    correction: Correction
    limit: float
    row_B: Tensor
    width: int
    mask_AT: Tensor
    sampler_AT: Tensor
    whole_AT: Tensor
    old_AT: Tensor

    @classmethod
    def of(cls, learner: Learner, recipe: Recipe, rollouts: Sequence[Rollout], row_B: Tensor) -> _Sampled:
        """Of a batch of which the rows `row_B` are learned from; the others go through the layers here."""
        device, preset = learner.decoder.device, correction_name(recipe)
        if preset == "off":
            rollouts, row_B = [rollouts[i] for i in row_B.tolist()], torch.arange(len(row_B))
        learned = row_B.tolist()
        mask_AT, sampler_AT, whole_AT = _padded(rollouts, whole_tokens(recipe))
        old_AT = torch.zeros_like(sampler_AT).to(device)
        others = sorted(set(range(len(rollouts))) - set(learned))
        if others:
            others_BT = learner.log_probs([rollouts[i] for i in others])
            old_AT[torch.tensor(others, device=device), : others_BT.shape[1]] = others_BT
        return cls(
            correction=PRESETS[preset],
            limit=recipe.loss.max_gap
            or usual_gap(learner.decoder.dtype, quantised_sampler=recipe.model.weights == "host"),
            row_B=row_B.to(device),
            width=max(len(rollouts[i].response_ids) for i in learned),
            mask_AT=mask_AT.to(device),
            sampler_AT=sampler_AT.to(device),
            whole_AT=whole_AT.to(device),
            old_AT=old_AT,
        )

    def learned(self, value_AT: Tensor) -> Tensor:
        """[B, T] of the rows that are learned from."""
        return value_AT[self.row_B, : self.width]

    def corrected(self, old_BT: Tensor) -> Corrected:
        """The weights of all A rows, from the old policy's log-probabilities of those learned from.

        Its numbers have `sampler_gap` too, the mean |log xi| where the sampler saw the whole context; not if
        it nowhere did. Raises FrugalError where that is beyond the limit. One that is no number is left to
        the step, which is dropped.
        """
        old_AT = self.old_AT.clone()
        old_AT[self.row_B, : self.width] = old_BT
        corrected = correct(self.correction, old_AT, self.sampler_AT, self.mask_AT)
        gap = mean_gap(old_AT, self.sampler_AT, self.whole_AT)
        if gap is None:
            return corrected
        if gap > self.limit:
            raise FrugalError(
                "the sampler is not the policy that learns: where it had the whole context, their "
                f"log-probabilities are {gap:.2g} nats a token apart on average, and loss.max_gap is "
                f"{self.limit:.2g} ({int(self.whole_AT.sum())} tokens compared). Likely: the sampler runs on "
                "stale or other weights, or at another temperature than the learner, or its arithmetic is "
                "coarser. The step was not taken. If this much is meant, set loss.max_gap above it"
            )
        return replace(corrected, stats={**corrected.stats, "sampler_gap": gap})


def _padded(rollouts: Sequence[Rollout], whole: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens there are, their sampler's log-probabilities, and which saw the whole context; all [A, T].

    `whole`: tokens of context up to which all of it is in the cache; None: however many.
    """
    width = max(len(r.response_ids) for r in rollouts)
    mask_AT = torch.zeros(len(rollouts), width, dtype=torch.bool)
    whole_AT = torch.zeros_like(mask_AT)
    sampler_AT = torch.zeros(len(rollouts), width)
    for i, rollout in enumerate(rollouts):
        length = len(rollout.response_ids)
        mask_AT[i, :length] = True
        sampler_AT[i, :length] = torch.from_numpy(rollout.logprob_T)
        # token t is drawn from the prompt and the t tokens before it
        fits = length if whole is None else whole - len(rollout.prompt_ids) + 1
        whole_AT[i, : min(length, max(0, fits))] = True
    return mask_AT, sampler_AT, whole_AT
