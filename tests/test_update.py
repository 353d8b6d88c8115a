"""Several optimizer steps on one rollout batch: how it is dealt, composed, and what a failure leaves."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from frugal_rl import train as loop
from frugal_rl import update
from frugal_rl.config import load_recipe
from frugal_rl.errors import FrugalError, InputError
from frugal_rl.journal import Journal
from frugal_rl.learn import Learner, Step
from frugal_rl.problems import Problem
from frugal_rl.session import open_session
from frugal_rl.storage import Changed
from frugal_rl.update import Group, _minibatches, composed, learn, learn_within_memory
from frugal_rl.weights import bits_of

from .conftest import make_decoder, make_rollouts
from .test_learn import UPDATE_TOLERANCE, WEIGHT_TOLERANCE, relative_errors, slow_log_probs

LR, CLIP, TEMPERATURE = 0.3, 2.0, 0.7
GROUPS, SAMPLES = 5, 4
MADE_UP = "loss.max_gap=1e9"  # of rollouts that no sampler drew
TWO = ["rollout.prompts=5", "learner.minibatches=2", MADE_UP]
QUIET = loop.Reporter(lambda text: None, lambda row: None)
SMALL = ["rollout.prompts=4", "rollout.samples=4", "data.heldout=8", "rollout.max_tokens=24"]


def make_groups(count: int = GROUPS) -> list[Group]:
    rng = np.random.default_rng(5)
    rollouts = make_rollouts(count * SAMPLES)
    return [
        Group(cast(Problem, None), rollouts[i : i + SAMPLES], [], rng.integers(0, 2, SAMPLES).tolist())
        for i in range(0, count * SAMPLES, SAMPLES)
    ]


def make_learner() -> tuple[Any, Learner]:
    model, decoder = make_decoder("qwen2")
    return model, Learner(decoder, LR, CLIP, TEMPERATURE, micro_tokens=100)


@contextmanager
def session_of(*changes: str) -> Iterator[loop.Session]:
    recipe = load_recipe("tiny", [*SMALL, *changes])
    with open_session(recipe, QUIET, device=torch.device("cpu")) as session:
        yield session


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(bits_of(a[k]), bits_of(b[k])) for k in a)


def snapshot(learner: Learner) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in learner.decoder.weights.tensors.items()}


# --- the twin: loops, autograd on the whole model, torch.optim.SGD


def grpo_advantages(group: Group) -> list[float]:
    mean = sum(group.rewards) / SAMPLES
    std = (sum((r - mean) ** 2 for r in group.rewards) / (SAMPLES - 1)) ** 0.5
    return [(r - mean) / (std + 1e-6) for r in group.rewards]


def sgd_on_minibatches(model: Any, groups: list[Group], minibatches: list[list[int]]) -> list[float]:
    """GRPO eq. 3 with the old policy of before the first step; returns the norms."""
    old = [[slow_log_probs(model, r).detach() for r in g.rollouts] for g in groups]
    optimiser = torch.optim.SGD(model.parameters(), lr=LR)
    norms = []
    for numbers in minibatches:
        total = torch.zeros(())
        for n in numbers:
            for old_T, rollout, a in zip(old[n], groups[n].rollouts, grpo_advantages(groups[n]), strict=True):
                ratio_T = (slow_log_probs(model, rollout) - old_T).exp()
                total = total + torch.minimum(ratio_T * a, ratio_T.clamp(0.8, 1.2) * a).mean()
        optimiser.zero_grad()
        (-total / (len(numbers) * SAMPLES)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimiser.step()
    return norms


@pytest.mark.parametrize("epochs", [1, 2])
def test_minibatches_are_a_loop_of_sgd_with_the_old_policy_of_before_it(
    epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("tiny", [*TWO, f"learner.epochs={epochs}"])
    model, learner = make_learner()
    before = snapshot(learner)
    steps: list[Step] = []
    real = Learner.step
    monkeypatch.setattr(Learner, "step", lambda *a: steps.append(real(*a)) or steps[-1])
    groups, minibatches = make_groups(), _minibatches(recipe, GROUPS, 1)
    learned = learn(learner, recipe, groups)
    norms = sgd_on_minibatches(model, groups, minibatches)
    assert learned is not None
    assert learned.stats["updates"] == len(norms) == len(steps) == 2 * epochs
    assert [s.commit.norm for s in steps] == pytest.approx(norms, rel=1e-4)
    assert learned.commit.norm == pytest.approx(sum(norms) / len(norms), rel=1e-4)
    weight, updated = relative_errors(model, learner.decoder, before)
    assert weight < 3 * WEIGHT_TOLERANCE  # one for each step, and what the ratio makes of the step before
    assert updated < 3 * UPDATE_TOLERANCE
    # the first step's ratios are 1, and then they matter
    assert steps[0].stats["ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert steps[0].stats["clip_share"] == 0
    assert steps[1].stats["ratio_max"] > 1.2
    assert steps[1].stats["clip_share"] > 0.01


def test_one_minibatch_takes_the_learners_own_old_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    _, learner = make_learner()
    monkeypatch.setattr(Learner, "log_probs", None)  # not called
    learned = learn(learner, load_recipe("tiny", ["rollout.prompts=5", MADE_UP]), make_groups())
    assert learned is not None
    assert learned.stats["updates"] == 1
    assert learned.stats["ratio_max"] == 1.0


@pytest.mark.parametrize("correction", ["off", "tis"])
def test_a_masked_truncated_response_is_in_the_baseline_and_neither_in_the_loss_nor_in_its_counts(
    correction: str,
) -> None:
    """With the old policy its own, the loss is -sum(A * tokens) / sum(tokens) over what is learned from."""
    groups = make_groups()
    cut = {(0, 1), (2, 0), (2, 3), (4, 2)}
    for g, s in cut:
        groups[g].rollouts[s] = replace(groups[g].rollouts[s], truncated=True)
    recipe = load_recipe(
        "tiny",
        [*TWO, "learner.minibatches=1", "loss.algorithm=dapo", "rollout.truncated=mask"]
        + ([] if correction == "off" else ["loss.correction=tis"]),
    )
    terms, tokens = 0.0, 0
    for g, group in enumerate(groups):
        signal = max(group.rewards) > min(group.rewards)
        for s, advantage in enumerate(grpo_advantages(group)):
            if (g, s) not in cut:
                tokens += len(group.rollouts[s].response_ids)
                terms += advantage * len(group.rollouts[s].response_ids) * signal
    if correction == "off":
        step = learn(make_learner()[1], recipe, groups)
        assert step is not None and step.loss == pytest.approx(-terms / tokens, rel=1e-5)  # float32 sums
    changed = []
    for replaced in (False, True):  # what a masked response says does not matter
        for g, s in cut if replaced else ():
            old = groups[g].rollouts[s]
            groups[g].rollouts[s] = replace(old, response_ids=old.response_ids[::-1].copy())
        learner = make_learner()[1]
        learn(learner, recipe, groups)
        changed.append(snapshot(learner))
    assert same_bits(*changed)
    learner = make_learner()[1]
    learn(learner, load_recipe("tiny", [*TWO, "learner.minibatches=1", "loss.algorithm=dapo"]), groups)
    assert not same_bits(changed[0], snapshot(learner))


def test_a_minibatch_without_signal_costs_no_step_and_its_rollouts_count_in_no_other() -> None:
    recipe = load_recipe("tiny", TWO)
    first, second = _minibatches(recipe, GROUPS, 1)
    groups = make_groups()
    flat = [replace(g, rewards=[1] * SAMPLES) if n in first else g for n, g in enumerate(groups)]
    _, learner = make_learner()
    learned = learn(learner, recipe, flat)
    _, alone = make_learner()
    expected = learn(alone, load_recipe("tiny", [MADE_UP]), [groups[n] for n in second])
    assert learned is not None and expected is not None
    assert learned.stats["updates"] == 1
    assert learned.commit.norm == pytest.approx(expected.commit.norm, rel=1e-5)


@pytest.mark.parametrize("algorithm", ["grpo", "reinforce++", "dapo"])
def test_a_kl_is_to_the_base_and_advantages_are_of_the_whole_batch(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("tiny", [*TWO, f"loss.algorithm={algorithm}", "loss.kl=0.1"])
    _, learner = make_learner()
    learn(learner, recipe, make_groups())  # away from the base
    seen = []
    real = update._Batch.loss

    def loss(batch: update._Batch, logprob_BT: Tensor) -> Any:
        seen.append(batch)
        return real(batch, logprob_BT)

    monkeypatch.setattr(update._Batch, "loss", loss)
    rollouts = [r for g in make_groups() for r in g.rollouts]
    with learner.decoder.weights.base():
        base_BT = learner.log_probs(rollouts)
    old_BT = learner.log_probs(rollouts)
    whole = update._Batch.of(recipe, make_groups(), learner, lambda work: work())
    assert whole is not None and torch.equal(whole.reference_BT, base_BT)
    advantage = whole.against(old_BT).advantage
    learn(learner, recipe, make_groups())
    for batch, numbers in zip(seen, _minibatches(recipe, GROUPS, 1), strict=True):
        rows = [n * SAMPLES + i for n in numbers for i in range(SAMPLES)]
        width = batch.mask_BT.shape[1]
        assert batch.old_BT is not None and batch.reference_BT is not None
        assert torch.equal(batch.old_BT, old_BT[rows, :width])
        assert torch.equal(batch.reference_BT, base_BT[rows, :width])
        expected = advantage[rows, :width] if advantage.ndim == 2 else advantage[rows]
        assert torch.equal(batch.advantage, expected)
        assert (advantage.ndim == 2) == (algorithm == "reinforce++")


# --- the pre-flight


def fly(session: loop.Session, said: list[str]) -> None:
    update.preflight(session.learner, session.plan, 16, 20, 24, said.append)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_a_preflight_changes_no_bit_and_draws_no_random_number(weights: str) -> None:
    with session_of(f"model.weights={weights}") as session:
        before, state = snapshot(session.learner), torch.get_rng_state()
        numbers = np.random.get_state()[1].copy()
        fly(session, [])
        assert same_bits(before, snapshot(session.learner))
        assert not session.policy.weights.overlay
        assert torch.equal(torch.get_rng_state(), state)
        assert (np.random.get_state()[1] == numbers).all()


@pytest.mark.parametrize("micro_tokens,count", [(43 * 5, 5), (43 * 5 - 1, 4), (10, 1), (100_000, 16)])
def test_a_preflight_is_the_longest_micro_batch_forward_and_backward(
    micro_tokens: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, backward = [], []
    through, real = Learner._through, Learner._backward
    with session_of() as session:
        session.learner.micro_tokens = micro_tokens

        def noted(learner: Learner, index: int, batch: Any, states: list[Tensor]) -> None:
            shapes.append([tuple(state.shape[:2]) for state in states])
            through(learner, index, batch, states)

        def back(*arguments: Any) -> None:
            backward.extend(reversed(arguments[1]))
            real(*arguments)

        monkeypatch.setattr(Learner, "_through", noted)
        monkeypatch.setattr(Learner, "_backward", back)
        fly(session, [])
        layers = len(session.policy.decoder.layers)
    assert shapes == [[(count, 43)]] * layers
    assert backward == list(reversed(range(layers)))


def test_a_preflight_holds_the_boundary_states_of_the_sequences_that_it_leaves_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty, held = torch.empty, []

    def noted(*size: Any, **options: Any) -> Tensor:
        made = empty(*size, **options)
        if options.get("dtype") == torch.uint8:
            held.append((weakref.ref(made), made.nbytes))
        return made

    def step(*_: Any) -> None:
        assert held[0][0]() is not None  # for as long as the step runs

    monkeypatch.setattr(torch, "empty", noted)
    with session_of() as session:
        monkeypatch.setattr(Learner, "step", step)
        session.learner.micro_tokens = 43 * 4
        fly(session, [])
        assert [size for _, size in held] == [session.plan.learning["boundary states"] * 12 // 16]
        assert held[0][0]() is None


def test_memory_that_runs_out_in_the_preflight_halves_the_micro_batch_and_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, widths, said = Learner._backward, [], list[str]()

    def backward(learner: Learner, index: int, batch: Any, *rest: Any) -> None:
        widths.append(batch.tokens[0].numel())
        if batch.tokens[0].numel() > 43 * 4:
            raise torch.OutOfMemoryError("made here")
        real(learner, index, batch, *rest)

    monkeypatch.setattr(Learner, "_backward", backward)
    with session_of() as session:
        session.learner.micro_tokens = 43 * 16
        fly(session, said)
        assert session.learner.micro_tokens == 43 * 4
    assert widths[:3] == [43 * 16, 43 * 8, 43 * 4]
    assert ["micro-batches of 344 tokens" in said[0], "micro-batches of 172 tokens" in said[1]] == [True] * 2


@pytest.mark.parametrize(
    "error,result,attempts,micro_tokens",
    [(torch.OutOfMemoryError, FrugalError, 4, 12), (RuntimeError, RuntimeError, 1, 100)],
)
def test_memory_is_tried_three_halves_long_and_any_other_error_comes_out_at_once(
    error: type[Exception], result: type[Exception], attempts: int, micro_tokens: int
) -> None:
    _, learner = make_learner()
    tried, said = [], list[str]()

    def work() -> None:
        tried.append(learner.micro_tokens)
        raise error("made here")

    with pytest.raises(result, match="made here"):
        update.within_memory(learner, said.append, work)
    assert (len(tried), len(said), learner.micro_tokens) == (attempts, attempts - 1, micro_tokens)


def test_a_run_begins_with_one_preflight_of_its_longest_lengths_and_ends_in_the_same_patch_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patches, calls = [], []
    real = loop.preflight

    def noted(*arguments: Any) -> None:
        calls.append(arguments[2:5])
        real(*arguments)

    for name, replacement in (("with", noted), ("without", lambda *_: None)):
        monkeypatch.setattr(loop, "preflight", replacement)
        with session_of("train.steps=2") as session:
            longest = loop.longest_prompt(session.problems)
            journal = Journal.create(tmp_path / name, session.recipe, force=False)
            loop.train(session, journal, QUIET, itertools.repeat(name == "with").__next__)
        if name == "with":
            with session_of("train.steps=2") as session:
                journal, _ = Journal.open(tmp_path / name)
                loop.resume(session, journal, QUIET)
                loop.train(session, journal, QUIET, lambda: False)
        patches.append((tmp_path / name / "patch.safetensors").read_bytes())
    assert calls == [(16, longest, 24)]  # none when the run went on
    assert patches[0] == patches[1]


# --- dealing


def test_minibatches_hold_every_group_once_an_epoch_in_an_order_of_seed_step_and_epoch() -> None:
    recipe = load_recipe("tiny", ["learner.minibatches=3", "learner.epochs=2"])
    dealt = _minibatches(recipe, 8, 4)
    assert [len(part) for part in dealt] == [3, 3, 2] * 2
    for epoch in (dealt[:3], dealt[3:]):
        assert sorted(itertools.chain(*epoch)) == list(range(8))
        assert all(part == sorted(part) for part in epoch)
    assert dealt[:3] != dealt[3:]
    assert dealt == _minibatches(recipe, 8, 4)
    assert dealt != _minibatches(recipe, 8, 5)
    assert dealt != _minibatches(load_recipe("tiny", ["learner.minibatches=3", "train.seed=1"]), 8, 4)
    assert _minibatches(recipe, 2, 1)[:2] in ([[0], [1]], [[1], [0]])  # fewer groups than minibatches


def test_more_minibatches_than_prompts_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"\[learner\] minibatches = 5 with \[rollout\] prompts = 4"):
        load_recipe("tiny", ["learner.minibatches=5", "rollout.prompts=4"])


# --- composition


def random_changes(rng: np.random.Generator, bits: dict[str, np.ndarray], count: int) -> dict[str, Changed]:
    """Few positions and few values, so that entries meet and come back; moves `bits`."""
    changes = {}
    for name, held_X in bits.items():
        if rng.random() < 0.2:
            continue
        position_N = np.sort(rng.choice(len(held_X), count, replace=False))
        after_N = (held_X[position_N] + rng.integers(1, 3, count)) % 3
        changes[name] = Changed(
            torch.from_numpy(position_N),
            torch.from_numpy(held_X[position_N].copy()),
            torch.from_numpy(after_N),
        )
        held_X[position_N] = after_N
    return changes


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_composed_changes_lead_from_the_first_bits_to_the_last_and_name_only_what_differs(
    seed: int, steps: int
) -> None:
    rng = np.random.default_rng(seed)
    bits = {name: np.zeros(30, np.int16) for name in ("a", "b", "c")}
    first = {name: value.copy() for name, value in bits.items()}
    together = composed([random_changes(rng, bits, 12) for _ in range(steps)])
    for name in bits:
        moved_N = np.nonzero(first[name] != bits[name])[0]
        assert (name in together) == bool(len(moved_N))
        if name in together:
            change = together[name]
            assert change.position_N.tolist() == moved_N.tolist()
            assert change.before_bits_N.tolist() == first[name][moved_N].tolist()
            assert change.after_bits_N.tolist() == bits[name][moved_N].tolist()


# --- failures


def test_out_of_memory_in_the_second_minibatch_runs_only_that_one_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, groups, said = load_recipe("tiny", TWO), make_groups(), list[str]()
    _, learner = make_learner()
    real, calls, sizes = Learner._backward, [0], []
    step = Learner.step

    def backward(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == 5:  # of three layers: in the middle of the second minibatch
            raise torch.OutOfMemoryError("made here")
        real(*arguments)

    def noted(learner: Learner, *arguments: Any) -> Step:
        sizes.append((len(arguments[0]), learner.micro_tokens))
        return step(learner, *arguments)

    monkeypatch.setattr(Learner, "_backward", backward)
    monkeypatch.setattr(Learner, "step", noted)
    learned = learn_within_memory(learner, recipe, groups, said.append)
    assert learned is not None
    assert learned.stats["updates"] == 2
    assert [micro for _, micro in sizes] == [100, 100, 50]
    assert sizes[1][0] == sizes[2][0] != sizes[0][0]
    assert len(said) == 1
    _, twin = make_learner()
    learn(twin, recipe, groups)
    pairs = [(snapshot(learner)[k], v) for k, v in snapshot(twin).items()]
    for mine, other in pairs:  # the sums of half the micro-batch are in another order
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_a_minibatch_that_is_dropped_leaves_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, groups = load_recipe("tiny", TWO), make_groups()
    real, calls, after = Learner.step, [0], []

    def spoilt(learner: Learner, rollouts: Any, loss: Any) -> Step:
        calls[0] += 1
        if calls[0] == 1:
            return real(learner, rollouts, loss)
        after.append(snapshot(learner))
        return real(learner, rollouts, lambda logprob_BT: (loss(logprob_BT)[0] * float("nan"), {}))

    monkeypatch.setattr(Learner, "step", spoilt)
    _, learner = make_learner()
    learned = learn(learner, recipe, groups)
    assert learned is not None
    assert learned.stats["updates"] == 1
    assert learned.commit.dropped == "1 of 2 updates: the loss is nan"
    assert learned.commit.entries > 0
    assert np.isfinite([learned.loss, learned.commit.norm]).all()
    assert same_bits(after[0], snapshot(learner))


def test_a_step_of_minibatches_is_one_file_that_leads_to_the_same_weights(tmp_path: Path) -> None:
    changes = ["learner.minibatches=3", "learner.epochs=2"]
    with session_of(*changes) as session:
        journal = Journal.create(tmp_path / "run", session.recipe, force=False)
        rows = [loop._step(session, journal, step, QUIET) for step in (1, 2)]
        policy = snapshot(session.learner)
    assert len(list((tmp_path / "run" / "journal").iterdir())) == 2
    assert max(row["updates"] for row in rows) > 1
    with session_of(*changes) as fresh:
        again, _ = Journal.open(tmp_path / "run")
        loop.resume(fresh, again, QUIET)
        assert same_bits(snapshot(fresh.learner), policy)


def test_a_crash_between_minibatches_leaves_nothing_and_the_step_runs_again_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["learner.minibatches=4"]
    real, calls = Learner.step, [0]

    def crash(*arguments: Any) -> Step:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    with session_of(*changes) as session:
        journal = Journal.create(tmp_path / "run", session.recipe, force=False)
        before = snapshot(session.learner)
        with monkeypatch.context() as patched:
            patched.setattr(Learner, "step", crash)
            with pytest.raises(KeyboardInterrupt):
                loop._step(session, journal, 1, QUIET)
        assert not same_bits(before, snapshot(session.learner))  # in memory, and gone with the process
        assert not list((tmp_path / "run" / "journal").iterdir())
    policies = []
    for folder in ("run", "whole"):
        with session_of(*changes) as session:
            if folder == "run":
                journal, _ = Journal.open(tmp_path / folder)
                loop.resume(session, journal, QUIET)
            else:
                journal = Journal.create(tmp_path / folder, session.recipe, force=False)
            loop._step(session, journal, 1, QUIET)
            policies.append(snapshot(session.learner))
    assert same_bits(*policies)


def test_memory_that_never_suffices_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise torch.OutOfMemoryError("made here")

    monkeypatch.setattr(Learner, "log_probs", none)
    _, learner = make_learner()
    with pytest.raises(FrugalError, match="out of memory with micro-batches of 12 tokens"):
        learn_within_memory(learner, load_recipe("tiny", TWO), make_groups(), QUIET.say)


def test_a_cpu_that_is_out_of_memory_is_known_by_its_words() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert update.is_out_of_memory(caught.value)
    assert not update.is_out_of_memory(RuntimeError("shapes do not match"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_whoever_on_a_gpu_is_out_of_memory_is_known(error: RuntimeError) -> None:
    assert update.is_out_of_memory(error)
    assert not update.is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
