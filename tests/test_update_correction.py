"""The step on rollouts that another policy may have drawn: corrections, what they log, and the alarm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from frugal_rl import train as loop
from frugal_rl import update
from frugal_rl.config import Recipe, load_recipe
from frugal_rl.correct import PRESETS, correct
from frugal_rl.errors import FrugalError
from frugal_rl.journal import Journal
from frugal_rl.rollout import Rollout
from frugal_rl.update import learn

from .test_train import QUIET, SMALL, groups_of, same_bits, session_of, snapshot


@pytest.fixture
def tiny() -> Iterator[loop.Session]:
    with session_of(load_recipe("tiny", SMALL)) as session:
        yield session


def compressed(recipe: Recipe, budget: int) -> Recipe:
    return replace(recipe, rollout=replace(recipe.rollout, kv_budget=budget))


def with_logprobs(groups: list[loop.Group], change: Callable[[Rollout], np.ndarray]) -> list[loop.Group]:
    """The same rollouts, drawn by a sampler with other log-probabilities."""
    return [replace(g, rollouts=[replace(r, policy_logprob_T=change(r)) for r in g.rollouts]) for g in groups]


def stepped(changes: list[str], make: Callable[[loop.Session], list[loop.Group]]) -> tuple[Any, Any]:
    """A fresh session's step on the groups made in it, and the weights after it."""
    with session_of(load_recipe("tiny", [*SMALL, *changes])) as session:
        return learn(session.learner, session.recipe, make(session)), snapshot(session)


def drawn(session: loop.Session) -> list[loop.Group]:
    """The first half of the groups has no signal."""
    groups = groups_of(session, lambda i: float(i == 0))
    return [*(replace(g, rewards=[0.0] * 4) for g in groups[:2]), *groups[2:]]


def test_a_correction_of_the_learners_own_rollouts_is_nearly_the_same_step() -> None:
    off, off_weights = stepped(["loss.correction=off"], drawn)
    assert off.stats["xi_p50"] == pytest.approx(1.0, abs=1e-5)
    auto, auto_weights = stepped([], drawn)
    assert same_bits(off_weights, auto_weights)
    assert auto.stats == off.stats
    for name in sorted(PRESETS):
        step, _ = stepped([f"loss.correction={name}"], drawn)
        # xi is 1 up to float32's rounding in two orders of sums: 1e-5, times 24 tokens in a product
        assert step.commit.norm == pytest.approx(off.commit.norm, rel=1e-4), name
        assert step.loss == pytest.approx(off.loss, abs=1e-6), name
        assert step.stats["masked_share"] == 0.0, name
        assert step.stats["effective_share"] == pytest.approx(1.0, abs=1e-4), name


@pytest.mark.parametrize("algorithm", ["grpo", "dapo"])
def test_what_is_left_out_for_want_of_an_advantage_still_weighs_in_the_corrections_means(
    algorithm: str,
) -> None:
    """Against a KL weight so small that it adds nothing but keeps every row in the batch."""

    def noisy(session: loop.Session) -> list[loop.Group]:
        rng = np.random.default_rng(0)
        return with_logprobs(
            drawn(session),
            lambda r: r.policy_logprob_T + rng.normal(0, 0.5, len(r.response_ids)).astype("f"),
        )

    changes = ["loss.correction=sparse-rl", "loss.max_gap=9", f"loss.algorithm={algorithm}"]
    left_out, _ = stepped(changes, noisy)
    kept, _ = stepped([*changes, "loss.kl=1e-30"], noisy)
    assert 0.1 < left_out.stats["masked_share"] < 0.9
    assert left_out.commit.norm == pytest.approx(kept.commit.norm, rel=1e-5)
    assert left_out.loss == pytest.approx(kept.loss, abs=1e-6)
    for name in ("masked_share", "effective_share", "xi_p01", "xi_p95", "sampler_gap"):
        assert left_out.stats[name] == pytest.approx(kept.stats[name], abs=1e-5)


@pytest.mark.parametrize("algorithm", ["grpo", "dapo"])
def test_the_steps_loss_is_the_papers_over_the_whole_batch(algorithm: str, tiny: loop.Session) -> None:
    rng = np.random.default_rng(1)
    groups = with_logprobs(
        drawn(tiny), lambda r: r.policy_logprob_T + rng.normal(0, 0.5, len(r.response_ids)).astype("f")
    )
    rollouts = [r for g in groups for r in g.rollouts]
    rollouts[9].policy_logprob_T[0] += 12  # rejected, and in a group with signal
    old_BT = tiny.learner.log_probs(rollouts).double().numpy()
    xis = [np.exp(old_BT[i, : len(r.response_ids)] - r.policy_logprob_T) for i, r in enumerate(rollouts)]
    mean = np.mean(np.minimum(np.concatenate(xis), 1.5))
    # rewards 1, 0, 0, 0: advantages 3/2 and three times -1/2; no signal in the first two groups
    advantages = [0.0] * 8 + [1.5, -0.5, -0.5, -0.5] * 2
    responses = kept = summed = 0.0
    for xi, advantage in zip(xis, advantages, strict=True):
        inside = (xi >= 0.5) & (xi <= 1.5) & (xi.min() >= 1e-4)
        term = -advantage * (np.minimum(xi, 1.5) / mean)[inside].sum()
        responses += term / max(inside.sum(), 1)
        summed += term
        kept += inside.sum()
    expected = {"grpo": responses / 16, "dapo": summed / kept}[algorithm]
    recipe = load_recipe(
        "tiny", [*SMALL, "loss.correction=sparse-rl", "loss.max_gap=9", f"loss.algorithm={algorithm}"]
    )
    step = learn(tiny.learner, recipe, groups)
    assert step is not None
    assert step.loss == pytest.approx(expected, abs=1e-5)  # float32 sums; the std's 1e-6
    assert step.stats["rejected_share"] >= 1 / 16


def test_a_response_with_a_token_that_the_old_policy_would_not_have_drawn_is_rejected() -> None:
    def spoilt(session: loop.Session) -> list[loop.Group]:
        groups = groups_of(session, lambda i: float(i == 0))
        first = groups[0].rollouts[0]
        return with_logprobs(
            groups,
            lambda r: r.policy_logprob_T + 12 * (r is first) * (np.arange(len(r.response_ids)) == 0),
        )

    step, _ = stepped(["loss.correction=sparse-rl", "loss.max_gap=9"], spoilt)
    assert step.stats["rejected_share"] == 1 / 16
    assert step.commit.entries > 0


def test_a_batch_rejected_whole_changes_nothing_and_says_why(tiny: loop.Session) -> None:
    recipe = load_recipe("tiny", [*SMALL, "loss.correction=sparse-rl", "loss.max_gap=99"])
    groups = with_logprobs(groups_of(tiny, lambda i: float(i == 0)), lambda r: r.policy_logprob_T + 12)
    before = snapshot(tiny)
    step = learn(tiny.learner, recipe, groups)
    assert step is not None
    assert (step.loss, step.commit.norm, step.commit.entries, step.commit.dropped) == (0.0, 0.0, 0, None)
    assert same_bits(before, tiny.policy.weights.tensors)
    said: list[str] = []
    row = {"dropped": None, "gradient_norm": 0.0, **step.stats}
    loop._say_still(tiny, 1, row, loop.Reporter(said.append, lambda row: None))
    assert "rejected every response" in said[0]
    assert "ratio below 6.1e-06" in said[0]  # exp(-12)


def test_weights_that_are_one_step_stale_stop_the_run_with_the_weights_as_they_were(
    tiny: loop.Session,
) -> None:
    stale = groups_of(tiny, lambda i: float(i == 0))
    first = learn(tiny.learner, tiny.recipe, stale)
    assert first is not None and 0 < first.stats["sampler_gap"] < 1e-5
    before = snapshot(tiny)
    with pytest.raises(FrugalError, match=r"stale or other weights.*loss\.max_gap"):
        learn(tiny.learner, tiny.recipe, stale)
    assert same_bits(before, tiny.policy.weights.tensors)
    fresh = learn(tiny.learner, tiny.recipe, groups_of(tiny, lambda i: float(i == 0)))
    assert fresh is not None and fresh.stats["sampler_gap"] < 1e-5
    assert learn(tiny.learner, load_recipe("tiny", [*SMALL, "loss.max_gap=1"]), stale) is not None


def test_a_sampler_at_another_temperature_stops_the_run(tiny: loop.Session) -> None:
    groups = groups_of(tiny, lambda i: float(i == 0))
    tiny.learner.temperature = 1.1
    with pytest.raises(FrugalError, match="another temperature"):
        learn(tiny.learner, tiny.recipe, groups)


def test_a_compressed_samplers_gap_counts_only_where_it_saw_the_whole_context(tiny: loop.Session) -> None:
    groups = groups_of(tiny, lambda i: float(i == 0))
    longest = max(len(r.prompt_ids) for g in groups for r in g.rollouts)
    budget = longest + 3
    recipe = compressed(tiny.recipe, budget)

    def off_from(context: int) -> list[loop.Group]:
        """Log-probabilities off by 0.3 at tokens that are drawn from more than so much context."""
        return with_logprobs(
            groups,
            lambda r: (
                r.policy_logprob_T
                + np.float32(0.3) * (len(r.prompt_ids) + np.arange(len(r.response_ids)) > context)
            ),
        )

    with pytest.raises(FrugalError, match="where it had the whole context"):
        learn(tiny.learner, recipe, off_from(budget - 1))
    step = learn(tiny.learner, recipe, off_from(budget))
    assert step is not None
    assert step.stats["sampler_gap"] < 1e-5
    assert step.stats["sampler_gap_max"] == pytest.approx(0.3, abs=1e-4)
    assert step.stats["xi_p01"] == pytest.approx(math.exp(-0.3), abs=1e-4)


def test_where_no_token_was_drawn_from_a_whole_context_there_is_no_gap_to_check(tiny: loop.Session) -> None:
    groups = with_logprobs(
        groups_of(tiny, lambda i: float(i == 0)), lambda r: r.policy_logprob_T + np.float32(0.3)
    )
    step = learn(tiny.learner, compressed(tiny.recipe, 1), groups)
    assert step is not None
    assert "sampler_gap" not in step.stats


def test_every_step_logs_what_the_correction_saw(tiny: loop.Session, tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "run", tiny.recipe, force=False)
    row = loop._step(tiny, journal, 1, QUIET)
    names = {"xi_p01", "xi_p05", "xi_p50", "xi_p95", "xi_p99", "rejected_share", "masked_share"}
    assert names | {"sampler_gap", "sampler_gap_k3", "effective_share"} <= set(row)


def test_minibatches_share_the_correction_of_the_whole_batch_and_count_their_own_tokens(
    tiny: loop.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    groups = with_logprobs(
        drawn(tiny), lambda r: r.policy_logprob_T + rng.normal(0, 0.5, len(r.response_ids)).astype("f")
    )
    rollouts = [r for g in groups for r in g.rollouts]
    old_BT = tiny.learner.log_probs(rollouts)
    mask_BT, sampler_BT = torch.zeros(old_BT.shape, dtype=torch.bool), torch.zeros(old_BT.shape)
    for i, rollout in enumerate(rollouts):
        mask_BT[i, : len(rollout.policy_logprob_T)] = True
        sampler_BT[i, : len(rollout.policy_logprob_T)] = torch.from_numpy(rollout.policy_logprob_T)
    expected = correct(PRESETS["sparse-rl"], old_BT, sampler_BT, mask_BT)
    seen: list[Any] = []
    real = update._Batch.loss
    monkeypatch.setattr(update._Batch, "loss", lambda batch, x: (seen.append(batch), real(batch, x))[1])
    words = [*SMALL, "loss.correction=sparse-rl", "loss.max_gap=9", "learner.minibatches=2"]
    step = learn(tiny.learner, load_recipe("tiny", words), groups)
    assert step is not None and step.stats["masked_share"] == pytest.approx(expected.stats["masked_share"])
    weights = {id(r): expected.weight_BT[i] for i, r in enumerate(rollouts)}
    counted = {id(r): int((expected.counted_BT & mask_BT)[i].sum()) for i, r in enumerate(rollouts)}
    assert len(seen) == 2  # each has one group with signal
    for batch in seen:
        for rollout, weight_T in zip(batch.rollouts, batch.weight_BT, strict=True):
            length = len(rollout.policy_logprob_T)
            torch.testing.assert_close(weight_T[:length], weights[id(rollout)][:length])
    assert sum(int(batch.counted_NG.sum()) for batch in seen) == sum(counted.values())
    assert all(int(batch.counted_NG.sum()) < int(batch.length_NG.sum()) for batch in seen)
