"""A rollout batch as the sampler drew it: corrected for what it is not, and watched.

The old policy is the learner's own before the step, dense; the sampler's log-probabilities came with
the rollouts. What is between the two is corrected (correct.py), and watched: where the sampler had its
whole context, the two are one policy and agree up to rounding. If they do not, the sampler ran on
other weights, and the run stops with this step not taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import Recipe, correction_name, whole_tokens
from .correct import PRESETS, Corrected, Correction, correct, mean_gap, usual_gap
from .errors import FrugalError
from .rollout import Rollout


@dataclass(frozen=True)
class Sampled:
    """Rollouts as the sampler drew them, beside the old policy's log-probabilities; A rows, right-padded.

    With a correction these are all rollouts of the batch: its means are theirs, and the share that it
    leaves out. Without one, those that are learned from. `place_A`: their places in the rollout batch,
    `row_B`: those among them that are learned from; `old_AT` is known of the others, and 0 there.
    `whole_AT`: tokens drawn with the whole context in the cache. `limit`: of `sampler_gap`, nats.
    """

    correction: Correction
    limit: float
    place_A: Tensor
    row_B: Tensor
    width: int
    mask_AT: Tensor
    sampler_AT: Tensor
    whole_AT: Tensor
    old_AT: Tensor

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        rollouts: Sequence[Rollout],
        row_B: Tensor,
        dtype: torch.dtype,
        log_probs: Callable[[Sequence[Rollout]], Tensor],
        device: torch.device,
    ) -> Sampled:
        """Of a batch of which the rows `row_B` are learned from; `log_probs` is asked for the others.

        `dtype`: of the learner's arithmetic.
        """
        preset, place_A = correction_name(recipe), torch.arange(len(rollouts))
        if preset == "off":
            rollouts, place_A = [rollouts[i] for i in row_B.tolist()], row_B
            row_B = torch.arange(len(row_B))
        learned = row_B.tolist()
        mask_AT, sampler_AT, whole_AT = _padded(rollouts, whole_tokens(recipe))
        old_AT = torch.zeros_like(sampler_AT).to(device)
        others = sorted(set(range(len(rollouts))) - set(learned))
        if others:
            others_BT = log_probs([rollouts[i] for i in others])
            old_AT[torch.tensor(others, device=device), : others_BT.shape[1]] = others_BT
        return cls(
            correction=PRESETS[preset],
            limit=recipe.loss.max_gap
            or usual_gap(
                dtype,
                quantised_sampler=recipe.model.weights == "host" or recipe.rollout.generator != "engine",
            ),
            place_A=place_A,
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

    def left_out(self, corrected: Corrected) -> Tensor:
        """How many tokens of each of the A rows averages do not count; on the host."""
        return (self.mask_AT & ~corrected.counted_BT).sum(1).cpu()

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
        sampler_AT[i, :length] = torch.from_numpy(rollout.policy_logprob_T)
        # token t is drawn from the prompt and the t tokens before it
        fits = length if whole is None else whole - len(rollout.prompt_ids) + 1
        whole_AT[i, : min(length, max(0, fits))] = True
    return mask_AT, sampler_AT, whole_AT
