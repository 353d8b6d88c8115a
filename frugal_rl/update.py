"""From a batch of judged groups to its optimizer steps: advantages, the reference, the loss, the learner.

Group: rollouts, judgements, rewards -> advantage -> loss(logprob_BT) -> Learner.step -> Step

As a rule a rollout batch is one optimizer step, and the old policy's log-probabilities are the learner's
own. With `learner.minibatches` or `learner.epochs` above 1 (PPO, arXiv 1707.06347 algorithm 1) they are
computed once, before the first of several steps; advantages and the reference are those of the whole
batch, and averages divide by the counts of the minibatch, as in volcengine/verl and huggingface/trl. A
minibatch is whole groups, dealt anew each epoch in an order that is a function of (seed, step, epoch), and
is a transaction of its own: one that is dropped, or runs out of memory, leaves the others as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .config import Recipe
from .decoder import Decoder
from .errors import FrugalError
from .learn import Baseline, Learner, Step
from .loss import ALGORITHMS, advantages, advantages_with_kl, kl_loss, policy_loss
from .memory import Plan
from .problems import Problem, order
from .reward import Judgement
from .rollout import Rollout
from .sampled import Sampled
from .shortage import give_back, is_out_of_memory
from .storage import Changed
from .weights import Commit

HALVINGS = 3  # of the micro-batch, when memory runs out
MINIBATCHES = 3  # first word of the random keys of their order; training and evaluation have their own

Result = TypeVar("Result")
Say = Callable[[str], None]
Attempt = Callable[[Callable[[], Any]], Any]


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


def make_learner(
    decoder: Decoder,
    recipe: Recipe,
    divided: Plan,
    *,
    reference: Decoder | None = None,
    baseline: Baseline | None = None,
) -> Learner:
    """A recipe's learner under a plan; `reference`: another model, which scores the rollouts."""

    def make(decoder: Decoder, clip: float | None, **more: Any) -> Learner:
        return Learner(
            decoder,
            lr=recipe.learner.lr,
            clip=clip,
            temperature=recipe.rollout.temperature,
            micro_tokens=divided.micro_tokens,
            boundary_on_host=divided.boundary_on_host,
            **more,
        )

    return make(
        decoder,
        recipe.learner.clip,
        boundary_every=divided.boundary_every,
        layers_together=divided.layers_together,
        reference=make(reference, None) if reference else None,
        baseline=baseline,
    )


def still_advice(row: Mapping[str, Any], lr: float, dtype: torch.dtype) -> str:
    """Why a step with these metrics may have changed no weight of that format, and what to do."""
    if row.get("rejected_share") == 1.0:
        return (
            "the correction rejected every response, so nothing was learned: the sampler's policy is too far "
            f"from the learner's (5 % of tokens have a ratio below {row['xi_p05']:.2g}): compress less"
        )
    if row["dropped"]:
        return f"the step was dropped, the weights are as they were: {row['dropped']}"
    return (
        f"no weight changed: learner.lr = {lr:g} is too small for {str(dtype).removeprefix('torch.')} "
        f"weights at a gradient norm of {row['gradient_norm']:.2g} (an update below half a unit in the "
        f"last place is rounded away). Plain SGD needs about 0.1 for LLMs, 1e-6 is an Adam habit: try "
        f"--set learner.lr={lr * 10:g}"
    )


def within_memory(learner: Learner, say: Say, work: Callable[[], Result]) -> Result:
    """`work()`; when memory runs out in it, again with smaller micro-batches, which later work keeps.

    `work` must leave nothing behind when it fails, as a transaction does. Raises FrugalError after HALVINGS.
    """
    for halving in range(HALVINGS + 1):
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if halving == HALVINGS or learner.micro_tokens == 1:
                raise FrugalError(
                    f"out of memory with micro-batches of {learner.micro_tokens} tokens: {error}; take "
                    "fewer samples or max_tokens, or a smaller memory.budget than the device has"
                ) from error
        learner.micro_tokens = max(1, learner.micro_tokens // 2)
        say(f"out of memory: going on with micro-batches of {learner.micro_tokens} tokens")
        learner.release()  # smaller states have blocks of another size
        give_back(learner.decoder.device)
    raise AssertionError("unreachable")


def preflight(
    learner: Learner, plan: Plan, sequences: int, prompt_tokens: int, response_tokens: int, say: Say
) -> None:
    """Run the longest micro-batch that can come through a step, `within_memory`: what does not fit fails now.

    `sequences` rollouts are planned, of up to so many tokens. Memory for the boundary states of those that
    are not in the micro-batch is held meanwhile. The loss is 0, and a gradient of 0 changes no bit.
    """
    decoder, rng = learner.decoder, np.random.default_rng(0)
    vocabulary = decoder.weights.held[decoder.embed_name].shape[0]

    def run() -> None:
        count = learner.micro_tokens // (prompt_tokens + response_tokens - 1)
        count = max(1, min(count, sequences))
        rollouts = [
            Rollout(
                prompt_ids=tuple(rng.integers(0, vocabulary, prompt_tokens).tolist()),
                response_ids=rng.integers(0, vocabulary, response_tokens),
                logprob_T=np.zeros(response_tokens, np.float32),
                truncated=True,
                policy_logprob_T=np.zeros(response_tokens, np.float32),
            )
            for _ in range(count)
        ]
        others = plan.learning["boundary states"] * (sequences - count) // sequences
        held = torch.empty(others, dtype=torch.uint8, device=decoder.device)
        learner.step(rollouts, lambda logprob_BT: (logprob_BT.sum() * 0, {}))
        del held

    within_memory(learner, say, run)


def learn_within_memory(
    learner: Learner, recipe: Recipe, groups: Sequence[Group], say: Say, *, step: int = 1
) -> Step | None:
    """`learn`, each of its parts `within_memory`. Raises FrugalError."""

    def attempt(work: Callable[[], Any]) -> Any:
        return within_memory(learner, say, work)

    return learn(learner, recipe, groups, step=step, attempt=attempt)


def learn(
    learner: Learner,
    recipe: Recipe,
    groups: Sequence[Group],
    *,
    step: int = 1,
    attempt: Attempt = lambda work: work(),
) -> Step | None:
    """The groups' optimizer steps as one (`together`); None when no rollout has an advantage.

    `step` decides the order of minibatches. `attempt` runs each optimizer step, and each pass without one.
    """
    batch = _Batch.of(recipe, groups, learner, attempt)
    if batch is None:
        return None
    minibatches = _minibatches(recipe, len(groups), step)
    if len(minibatches) > 1:
        batch = batch.against(attempt(partial(learner.log_probs, batch.rollouts)))
    steps = []
    for numbers in minibatches:
        part = batch.part(numbers)
        if part.rollouts:
            steps.append(attempt(partial(learner.step, part.rollouts, part.loss)))
    return together(steps)


def _minibatches(recipe: Recipe, groups: int, step: int) -> list[list[int]]:
    """The groups of each optimizer step, ascending; sizes differ by one at most, none is empty."""
    count = min(recipe.learner.minibatches, groups)
    dealt = []
    for epoch in range(recipe.learner.epochs):
        shuffled = order(groups, MINIBATCHES, recipe.train.seed, step, epoch)
        dealt += [sorted(shuffled[first::count]) for first in range(count)]
    return dealt


def together(steps: Sequence[Step]) -> Step:
    """Several optimizer steps in a row as one: their changes composed, their numbers averaged.

    A dropped step counts in no average, unless all were dropped; `dropped` says how many and why the first.
    Of a statistic that is a maximum (`_max`) it is the largest. `stats` gets `updates`, how many committed.
    """
    done = [s for s in steps if s.commit.dropped is None]
    if len(steps) == 1:
        return replace(steps[0], stats={**steps[0].stats, "updates": len(done)})
    counted = done or steps
    why = next((s.commit.dropped for s in steps if s.commit.dropped is not None), None)
    if why is not None:
        why = f"{len(steps) - len(done)} of {len(steps)} updates: {why}"
    stats = {}
    for name in dict.fromkeys(name for s in counted for name in s.stats):
        values = [s.stats[name] for s in counted if name in s.stats]
        stats[name] = max(values) if name.endswith("_max") else _mean(values)
    commit = Commit(
        norm=_mean([s.commit.norm for s in counted]),
        scale=_mean([s.commit.scale for s in counted]),
        changed=composed([s.commit.changed for s in done]),
        dropped=why,
        adapted=max(s.commit.adapted for s in steps),
    )
    return Step(
        commit=commit,
        loss=_mean([s.loss for s in counted]),
        stats={**stats, "updates": len(done)},
        entropy=_mean([s.entropy for s in counted]),
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def composed(changes: Sequence[Mapping[str, Changed]]) -> dict[str, Changed]:
    """Changes made one after the other, as one change of each tensor.

    An entry has the bits before its first change and after its last; one whose bits came back is left out.
    """
    out = {}
    for name in dict.fromkeys(name for change in changes for name in change):
        parts = [change[name] for change in changes if name in change]
        # stable: of equal positions, the earlier change stays first
        position_N, order_N = torch.sort(torch.cat([p.position_N for p in parts]), stable=True)
        first_N = torch.ones_like(position_N, dtype=torch.bool)
        first_N[1:] = position_N[1:] != position_N[:-1]
        last_N = first_N.roll(-1)  # before the next position's first
        before_N = torch.cat([p.before_bits_N for p in parts])[order_N][first_N]
        after_N = torch.cat([p.after_bits_N for p in parts])[order_N][last_N]
        differs_N = before_N != after_N
        if bool(differs_N.any()):
            out[name] = Changed(position_N[first_N][differs_N], before_N[differs_N], after_N[differs_N])
    return out


@dataclass(frozen=True)
class _Batch:
    """Rollouts to learn from and what the loss needs of them; B rows, T up to the longest response.

    `row_groups`: the group of each row. `length_NG`: response tokens; `counted_NG`: those averages count;
    what has no row for want of an advantage is among them. `reward_NG`: of the whole rollout batch.
    `advantage`: [B], or [B, T] with a KL in the reward. `old_BT`: the old policy's log-probabilities; None:
    it is the learner itself, and `against` completes the batch. `weight_BT`, `counted_BT` and `stats` are
    the correction's.
    """

    recipe: Recipe
    rollouts: list[Rollout]
    row_groups: list[int]
    reward_NG: Tensor
    length_NG: Tensor
    advantage: Tensor
    mask_BT: Tensor
    sampled: Sampled
    reference_BT: Tensor | None = None
    old_BT: Tensor | None = None
    counted_NG: Tensor | None = None
    weight_BT: Tensor | None = None
    counted_BT: Tensor | None = None
    stats: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe, groups: Sequence[Group], learner: Learner, attempt: Attempt) -> _Batch | None:
        """The whole rollout batch; None if nothing in it has an advantage."""
        everyone = [r for g in groups for r in g.rollouts]
        reward_NG = torch.tensor([g.rewards for g in groups], dtype=torch.float32)
        length_NG = torch.tensor([[len(r.response_ids) for r in g.rollouts] for g in groups])
        advantage_B = advantages(reward_NG, ALGORITHMS[recipe.loss.algorithm], length_NG).view(-1)
        if recipe.rollout.truncated == "mask":  # DAPO's overlong filtering: in the baseline, not in the loss
            cut_B = torch.tensor([r.truncated for r in everyone])
            advantage_B[cut_B] = 0
            length_NG.view(-1)[cut_B] = 0
        # without a KL term, what has no advantage has no gradient
        rows = torch.arange(len(everyone)) if recipe.loss.kl else torch.nonzero(advantage_B).view(-1)
        if not len(rows):
            return None
        rollouts = [everyone[i] for i in rows.tolist()]
        device = learner.decoder.device
        sampled = Sampled.of(
            recipe,
            everyone,
            rows,
            learner.decoder.dtype,
            lambda others: attempt(partial(learner.log_probs, others)),
            device,
        )
        return cls(
            recipe=recipe,
            rollouts=rollouts,
            row_groups=(rows // reward_NG.shape[1]).tolist(),
            reward_NG=reward_NG.to(device),
            length_NG=length_NG,
            advantage=advantage_B[rows].to(device),
            mask_BT=sampled.learned(sampled.mask_AT),
            sampled=sampled,
            reference_BT=attempt(partial(learner.reference_log_probs, rollouts)) if recipe.loss.kl else None,
        )

    def against(self, old_BT: Tensor) -> _Batch:
        """Complete, by the old policy's log-probabilities of the whole batch. Raises as Sampled.corrected."""
        algorithm, corrected = ALGORITHMS[self.recipe.loss.algorithm], self.sampled.corrected(old_BT)
        advantage, counted_NG = self.advantage, self.length_NG.clone()
        counted_NG.view(-1)[self.sampled.place_A] -= self.sampled.left_out(corrected)
        counted_NG.clamp_(min=0)  # what is not learned from counts 0 already
        if self.reference_BT is not None and algorithm.kl == "reward":
            advantage = advantages_with_kl(
                self.reward_NG, algorithm, old_BT, self.reference_BT, self.mask_BT, self.recipe.loss.kl
            )
        return replace(
            self,
            old_BT=old_BT,
            advantage=advantage,
            counted_NG=counted_NG,
            weight_BT=self.sampled.learned(corrected.weight_BT),
            counted_BT=self.sampled.learned(corrected.counted_BT),
            stats=corrected.stats,
        )

    def part(self, numbers: Sequence[int]) -> _Batch:
        """The rows and the counts of these groups."""
        rows = [row for row, number in enumerate(self.row_groups) if number in numbers]
        rollouts = [self.rollouts[row] for row in rows]
        width = max((len(r.response_ids) for r in rollouts), default=0)

        def cut(value: Tensor) -> Tensor:
            return value[rows, :width] if value.ndim == 2 else value[rows]

        def maybe(value: Tensor | None) -> Tensor | None:
            return None if value is None else cut(value)

        return replace(
            self,
            rollouts=rollouts,
            row_groups=[self.row_groups[row] for row in rows],
            length_NG=self.length_NG[list(numbers)],
            counted_NG=None if self.counted_NG is None else self.counted_NG[list(numbers)],
            advantage=cut(self.advantage),
            mask_BT=cut(self.mask_BT),
            reference_BT=maybe(self.reference_BT),
            old_BT=maybe(self.old_BT),
            weight_BT=maybe(self.weight_BT),
            counted_BT=maybe(self.counted_BT),
        )

    def loss(self, logprob_BT: Tensor) -> tuple[Tensor, dict[str, float]]:
        """What the learner minimises, and numbers to log."""
        batch = self if self.old_BT is not None else self.against(logprob_BT.detach())
        assert batch.old_BT is not None and batch.counted_NG is not None
        algorithm, section = ALGORITHMS[self.recipe.loss.algorithm], self.recipe.loss
        sequences, max_tokens = self.length_NG.numel(), self.recipe.rollout.max_tokens
        value, stats = policy_loss(
            algorithm,
            logprob_BT,
            batch.old_BT,
            batch.advantage,
            self.mask_BT,
            sequences=sequences,
            tokens=int(batch.counted_NG.sum()),
            max_tokens=max_tokens,
            clip_low=section.clip_low,
            clip_high=section.clip_high,
            weight_BT=batch.weight_BT,
            counted_BT=batch.counted_BT,
        )
        if self.reference_BT is not None and algorithm.kl == "loss":
            penalty = kl_loss(
                algorithm,
                logprob_BT,
                self.reference_BT,
                self.mask_BT,
                sequences=sequences,
                tokens=int(self.length_NG.sum()),
                max_tokens=max_tokens,
            )
            value = value + section.kl * penalty
            stats = {**stats, "kl": float(penalty.detach())}
        return value, {**stats, **batch.stats}
