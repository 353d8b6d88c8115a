"""The loop: draw problems -> generate -> verify -> learn -> commit, on one device, in turns.

    problem -> Request -> Rollout -> Judgement -> advantage -> Learner.step -> Commit -> Journal

Every number a step needs beyond the weights is a function of the seed and of two counters (the step,
and how many problems were drawn), so a run repeats bit for bit on the same machine, and a resumed run
goes on as if it had never stopped. The weights change in one place, `Transaction.commit`; a step is
done when its patch is in the journal.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from .arms import DENSE, check_resumable
from .config import Recipe
from .correct import ASTRAY
from .curation import check_unchanged, read_run_file
from .doctor import examine
from .errors import FrugalError, InputError
from .evaluate import Evaluation, Score, evaluate
from .journal import Journal, shortened
from .lora import Adapters
from .loss import ALGORITHMS, overlong_penalty
from .patch import Patch
from .peaks import Peaks
from .policy import load_policy
from .problems import Problem, draw
from .reward import Judgement, refuse_errors
from .rollout import Request, Rollout
from .session import Reporter, Session, divide, longest_prompt, make_engine, truncation_of
from .update import Group, learn_within_memory, preflight, still_advice
from .weights import export, step_patch

TRAINING = 1  # first word of the random keys; evaluation has its own
REFILLS = 8  # dynamic sampling: rounds of prompts drawn for one step before it goes on with what it has
ASTRAY_MOST = 0.1  # of a step's responses may have gone astray under compression: more, and the run says so
SAMPLES = 2  # responses a step, each to another problem, that the run folder keeps for people
STILL_STEPS = 3  # so many steps in a row without a changed weight, and the run stops


def train(
    session: Session, journal: Journal, report: Reporter, stopped: Callable[[], bool]
) -> dict[str, Any]:
    """Run the recipe's remaining steps; returns the summary that is also written to the run folder.

    `stopped` is asked after every step: True ends the run there, with everything saved.
    """
    recipe, began = session.recipe, time.perf_counter()
    dense = recipe.learner.kind in DENSE
    journal.write_json("session.json", {**_planned(session), "environment": examine()})
    if not journal.step:  # the micro-batches of a run that goes on have been through whole steps
        preflight(
            session.learner,
            session.plan,
            recipe.rollout.prompts * recipe.rollout.samples,
            longest_prompt(session.problems),
            recipe.rollout.max_tokens,
            report.say,
        )
    if not journal.validations:
        report.say(f"held-out accuracy before: {_validate(session, journal, 0)}")
    train_s = sum(row["seconds"] for row in journal.metrics)
    still, silent, warned, interrupted = 0, False, 0, False
    for step in range(journal.step + 1, recipe.train.steps + 1):
        row = _step(session, journal, step, report)
        train_s += row["seconds"]
        report.step(row)
        warned = _say_astray(recipe, row, warned, report)
        hidden = dense and row["gradient_norm"]  # a step may be in the masters and not yet in the weights
        still = still + 1 if row["signal_groups"] and not row["changed_step"] and not hidden else 0
        if still:
            _say_still(session, still, row, report)
        if not row["signal_groups"] and not silent:
            verdicts = ", ".join(f"{count} {name}" for name, count in sorted(row["verdicts"].items()))
            report.say(
                f"step {step} learned nothing: in no group did rewards differ (verdicts: {verdicts}). Does "
                f"reward.kind = {recipe.reward.kind!r} suit this data, and is the task within reach? More "
                "rollout.samples or easier problems give signal; frugal-rl eval --show 3 prints answers"
            )
        silent = not row["signal_groups"]
        if interrupted := stopped():
            break
        if recipe.train.eval_every is not None and step % recipe.train.eval_every == 0:
            report.say(f"step {step}: held-out accuracy {_validate(session, journal, step)}")
            if recipe.train.patience is not None and journal.since_best() >= recipe.train.patience:
                report.say(f"stopped early: no evaluation since step {journal.best()['step']} was better")
                break
    if not interrupted:
        _validate(session, journal, journal.step)
    return _finish(session, journal, train_s, began, report)


def _say_astray(recipe: Recipe, row: Mapping[str, Any], warned: int, report: Reporter) -> int:
    """Say that compression destroys what the answers need, at most every ten steps; the last step told."""
    compression, astray = recipe.rollout.compression, row.get("astray_share", 0.0)
    if compression is None or astray <= ASTRAY_MOST or (warned and row["step"] < warned + 10):
        return warned
    report.say(
        f"step {row['step']}: the compressed cache leads answers astray: {astray:.0%} of the responses have "
        f"a token that the policy itself gives less than {ASTRAY:g} of the sampler's probability "
        f"({ASTRAY_MOST:.0%} is much), and the correction leaves out {row['masked_share']:.0%} of the "
        f"tokens. What the answers need is evicted: raise rollout.kv_budget above {compression.budget} "
        f"(responses have up to {row['longest_tokens']} tokens), or try another rollout.eviction"
    )
    return int(row["step"])


def _say_still(session: Session, still: int, row: Mapping[str, Any], report: Reporter) -> None:
    """A run whose steps change nothing must say so at once."""
    advice = still_advice(row, session.recipe.learner.lr, session.policy.weights.storage_dtype)
    report.say(advice)
    if still == STILL_STEPS:
        raise FrugalError(f"{STILL_STEPS} steps in a row changed nothing. Last: {advice}")


# --- one step


def _step(session: Session, journal: Journal, step: int, report: Reporter) -> dict[str, Any]:
    """Generate, verify, learn, commit. Returns the step's metrics."""
    clock = _Clock(session.peaks)
    groups, drawn, sampled = _sample_groups(session, journal.drawn, clock)
    with clock("learn"):
        learned = learn_within_memory(session.learner, session.recipe, groups, report.say, step=step)
    commit = learned.commit if learned else None
    changed = commit.changed if commit else {}
    weights = session.policy.weights
    any_bit, moved = session.changed_counts()
    rollouts = [r for g in groups for r in g.rollouts]
    lengths = [len(r.response_ids) for r in rollouts]
    ended = [len(r.response_ids) for r in rollouts if not r.truncated]
    rewards = [x for g in groups for x in g.rewards]
    verdicts = Counter(j.verdict.value for g in groups for j in g.judgements)
    parts = sorted({name for g in groups for j in g.judgements for name in j.parts})
    row: dict[str, Any] = {
        "step": step,
        "reward": float(np.mean(rewards)),
        "reward_std": float(np.std(rewards, ddof=1)),
        "correct": verdicts["correct"] / len(rollouts),
        "verdicts": dict(verdicts),
        **{f"reward/{p}": float(np.mean([j.parts[p] for g in groups for j in g.judgements])) for p in parts},
        "groups": len(groups),
        "signal_groups": sum(g.has_signal for g in groups),
        "sampled_groups": sampled,
        "response_tokens": float(np.mean(lengths)),
        "shortest_tokens": min(lengths),
        "longest_tokens": max(lengths),
        "ended_tokens": float(np.mean(ended)) if ended else None,
        "truncated": sum(r.truncated for r in rollouts) / len(rollouts),
        "loss": learned.loss if learned else None,
        "entropy": learned.entropy if learned else None,
        "gradient_norm": commit.norm if commit else None,
        "clip_scale": commit.scale if commit else None,
        "dropped": commit.dropped if commit else None,
        "updates": 0,
        "changed_step": commit.entries if commit else 0,
        "changed_any": any_bit,
        "changed_1e5": moved,
        **(learned.stats if learned else {}),
        "problems_drawn": drawn,
        "slots": session.engine.slots,
        "micro_tokens": session.learner.micro_tokens,
        "generated_tokens": sum(lengths),
        "tokens_per_s": sum(lengths) / clock.seconds["generate"],
        "peak_memory_bytes": session.peaks.most_bytes,
    }
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    row |= {"seconds": clock.total(), "phase_seconds": clock.seconds, "phase_peak_bytes": clock.peak_bytes}
    assert weights.base_info is not None
    base = replace(weights.base_info, fingerprints={})
    patch = step_patch(weights, changed, base, {})
    journal.commit(patch, drawn, row, [_sample(session, step, group) for group in groups[:SAMPLES]])
    return row


def _sample(session: Session, step: int, group: Group) -> dict[str, Any]:
    """A group's first response, for people to read."""
    rollout, judgement = group.rollouts[0], group.judgements[0]
    return {
        "step": step,
        "problem": group.problem.id,
        "prompt": shortened(group.problem.prompt),
        "response": shortened(session.policy.text(rollout.response_ids)),
        "answer": shortened(group.problem.answer),
        "verdict": judgement.verdict.value,
        "reward": group.rewards[0],
        "tokens": len(rollout.response_ids),
        "truncated": rollout.truncated,
    }


def _sample_groups(session: Session, drawn: int, clock: _Clock) -> tuple[list[Group], int, int]:
    """The step's groups, the data counter after them, and how many groups were sampled for them."""
    recipe = session.recipe
    dynamic = ALGORITHMS[recipe.loss.algorithm].dynamic_sampling
    kept: list[Group] = []
    sampled = 0
    for _ in range(REFILLS if dynamic else 1):
        numbers = draw(len(session.problems.train), recipe.train.seed, drawn, recipe.rollout.prompts)
        groups = _generate(session, [session.problems.train[n] for n in numbers], drawn, clock)
        drawn += len(numbers)
        sampled += len(groups)
        kept += [g for g in groups if g.has_signal] if dynamic else groups
        if len(kept) >= recipe.rollout.prompts:
            break
    return (kept or groups)[: recipe.rollout.prompts], drawn, sampled


def _generate(session: Session, problems: Sequence[Problem], drawn: int, clock: _Clock) -> list[Group]:
    """Samples of each problem, verified while others are still being sampled."""
    recipe, samples = session.recipe, session.recipe.rollout.samples
    requests = [
        Request(problem.prompt_ids, (recipe.train.seed, TRAINING, drawn + i, sample))
        for i, problem in enumerate(problems)
        for sample in range(samples)
    ]
    rollouts: dict[int, Rollout] = {}
    texts: dict[int, str] = {}
    futures = {}
    with clock("generate"):
        stream = session.engine.generate(
            requests,
            max_tokens=recipe.rollout.max_tokens,
            temperature=recipe.rollout.temperature,
            truncation=truncation_of(recipe),
        )
        with closing(stream):  # type: ignore[type-var]
            for index, rollout in stream:
                rollouts[index] = rollout
                texts[index] = session.policy.text(rollout.response_ids)
                if rollout.truncated and recipe.rollout.truncated == "no_answer":
                    futures[index] = session.verifier.unanswered("cut off at rollout.max_tokens")
                    continue
                futures[index] = session.verifier.submit(problems[index // samples], texts[index])
    groups = []
    with clock("verify"):
        for i, problem in enumerate(problems):
            indices = range(i * samples, (i + 1) * samples)
            judgements = [futures[k].result() for k in indices]
            mine = [rollouts[k] for k in indices]
            rewards = [_paid(recipe, r, j) for r, j in zip(mine, judgements, strict=True)]
            groups.append(Group(problem, mine, judgements, rewards))
    refuse_errors([(problems[k // samples], texts[k], futures[k].result()) for k in sorted(futures)])
    return groups


def _paid(recipe: Recipe, rollout: Rollout, judgement: Judgement) -> float:
    share = ALGORITHMS[recipe.loss.algorithm].overlong_share
    if share is None:
        return judgement.reward
    most = recipe.rollout.max_tokens
    buffer = max(1, round(share * most))
    return judgement.reward + overlong_penalty(len(rollout.response_ids), most, buffer)


# --- before and after


def _heldout(session: Session) -> Evaluation:
    """One greedy answer to each held-out problem."""
    return evaluate(
        session.policy,
        session.engine,
        session.verifier,
        session.problems.heldout,
        max_tokens=session.recipe.rollout.max_tokens,
        seed=session.recipe.train.seed,
    )


def _validate(session: Session, journal: Journal, step: int) -> Score:
    """`_heldout`, noted in the run folder."""
    found = _heldout(session)
    journal.validate(step, asdict(found.score), found.correct)
    return found.score


def _finish(
    session: Session, journal: Journal, train_s: float, began: float, report: Reporter
) -> dict[str, Any]:
    """Write patch.safetensors and summary.json; returns the summary.

    `accuracy_after` is None where the last step was not evaluated, because the run was stopped.
    """
    accuracy = {row["step"]: row["accuracy"] for row in journal.validations}
    weights = session.policy.weights
    any_bit, moved = session.changed_counts()
    device = session.policy.decoder.device
    results: dict[str, Any] = {
        "steps": journal.step,
        "accuracy_before": accuracy[0],
        "accuracy_after": accuracy.get(journal.step),
        "parameters": weights.parameters,
        "changed_any": any_bit,
        "changed_1e5": moved,
        "seed": session.recipe.train.seed,
    }
    # the patch is a function of the recipe alone: no times, so that two equal runs are equal files
    meta = {"recipe": session.recipe.to_toml(), "metrics": results}
    form, adapters = session.recipe.model.weights, isinstance(session.baseline, Adapters)
    if isinstance(session.baseline, Adapters):
        patch, merge_lost = session.baseline.patch(session.files.folder, session.files.name, meta)
        adapter_bytes = session.baseline.save(journal.folder / "adapter", session.recipe.model.name)
        results |= {"adapter_bytes": adapter_bytes, "merge_lost": merge_lost}
    elif form == "int8":
        patch, lost = export(weights, session.files.folder, session.files.name, meta)
        results |= {"export_lost": lost}
    else:
        patch = weights.patch(meta)
    correct, engine = "", session.recipe.rollout.generator == "engine"
    if form != "bf16" or adapters or not engine:  # what was sampled is not what the patch makes of the base
        exported = _exported(session, patch, report) if journal.step in accuracy else None
        results |= {"accuracy_exported": asdict(exported.score) if exported else None}
        correct = exported.correct if exported else ""
        patch = replace(patch, meta=meta)
    patch_bytes = patch.save(journal.folder / "patch.safetensors")
    summary = {
        **results,
        **({"exported_correct": correct} if correct else {}),
        "best": journal.best(),
        "model": session.files.name,
        "kind": session.recipe.learner.kind,
        "recipe_steps": session.recipe.train.steps,
        "patch": str(journal.folder / "patch.safetensors"),
        "patch_bytes": patch_bytes,
        "train_seconds": train_s,
        "session_seconds": time.perf_counter() - began,
        "peak_memory_bytes": session.peaks.most_bytes,
        "weights_bytes": weights.nbytes,
        "optimizer_bytes": session.baseline.nbytes if session.baseline else 0,
        **_planned(session),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    journal.write_json("summary.json", summary)
    return summary


def _exported(session: Session, patch: Patch, report: Reporter) -> Evaluation | None:
    """Evaluate a run's patch on the checkpoint in its own format; None if that does not fit."""
    policy, device = session.policy, session.policy.decoder.device
    whole = session.recipe.model.weights == "bf16"
    rollout = replace(session.recipe.rollout, generator="engine", gguf=None)
    recipe = replace(session.recipe, model=replace(session.recipe.model, weights="bf16"), rollout=rollout)
    if (
        whole and session.baseline is None
    ):  # llama.cpp sampled: the plan's slots and micro-batches do for the engine too
        return _heldout(replace(session, engine=make_engine(policy, recipe, session.plan, report.say)))
    try:
        divided = divide(
            session.files,
            recipe,
            longest_prompt(session.problems),
            device,
            taken_bytes=policy.weights.nbytes,
        )
    except InputError:
        report.say(
            f"the whole checkpoint does not fit beside the {session.recipe.model.weights} policy: "
            "score its patch with frugal-rl eval --patch"
        )
        return None
    policy = load_policy(session.files, policy.tokenizer, device)
    policy.weights.write_patch_(patch)
    return _heldout(replace(session, policy=policy, engine=make_engine(policy, recipe, divided, report.say)))


def resume(session: Session, journal: Journal, report: Reporter) -> None:
    """Bring a fresh session to the journal's last step.

    Slots and micro-batches are those of the run, whatever memory is free now: they decide the order of sums.
    Raises InputError where the problems are not those that the run began with, and for a baseline, whose
    optimizer has a state.
    """
    check_resumable(session.recipe.learner.kind, journal.folder)
    check_unchanged(session.problems, read_run_file(journal.folder), journal.folder)
    for patch in journal.replay():
        session.policy.weights.write_patch_(patch)
    journal.restore()
    if journal.metrics:
        session.engine.slots = journal.metrics[-1]["slots"]
        session.learner.micro_tokens = journal.metrics[-1]["micro_tokens"]
    for note in journal.notes:
        report.say(note)


def _planned(session: Session) -> dict[str, Any]:
    """What a run is expected to take; `held_memory_bytes` of it before its weights are read."""
    held = session.policy.held_bytes
    return {
        "planned_memory_bytes": session.plan.peak_bytes + held,
        "held_memory_bytes": held,
        "plan": session.plan.as_json(),
    }


class _Clock:
    """Seconds and peak memory by phase. Phases do not nest; of one that comes again the peaks' largest."""

    def __init__(self, peaks: Peaks) -> None:
        self.seconds: dict[str, float] = {"generate": 0.0, "verify": 0.0, "learn": 0.0}
        self.peak_bytes: dict[str, int | None] = {}
        self._peaks = peaks
        self._began = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        self._peaks.begin()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began
            peak = self._peaks.end()
            known = self.peak_bytes.get(phase)
            self.peak_bytes[phase] = peak if known is None or peak is None else max(known, peak)

    def total(self) -> float:
        return time.perf_counter() - self._began
