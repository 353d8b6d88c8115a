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
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from .config import Recipe
from .decoder import check_supported, longest_sequence
from .doctor import examine
from .errors import FrugalError, InputError
from .evaluate import Score, evaluate
from .generate.engine import Engine, room_for
from .generate.eviction import Eviction
from .generate.sample import StopText, Truncation
from .journal import Journal, shortened
from .learn import Learner
from .loss import ALGORITHMS, overlong_penalty
from .memory import Plan, Shape, Work, host_bytes, plan, return_large_blocks
from .models import ModelFiles, find_model, load_config, load_tokenizer
from .patch import Patch
from .peaks import Peaks
from .policy import Policy, best_device, load_policy, load_reference
from .problems import Problem, ProblemSet, draw, load_problems
from .reward import Judgement, Verdict, Verifier
from .rollout import Request, Rollout
from .update import Group, learn_within_memory, preflight
from .weights import export, step_patch

TRAINING = 1  # first word of the random keys; evaluation has its own
REFILLS = 8  # dynamic sampling: rounds of prompts drawn for one step before it goes on with what it has
ERRORS_MOST = 0.05  # of a step's verdicts may be ERROR: more, and the reward itself is broken
SAMPLES = 2  # responses a step, each to another problem, that the run folder keeps for people
STILL_STEPS = 3  # so many steps in a row without a changed weight, and the run stops


@dataclass(frozen=True)
class Reporter:
    """Where a run's progress goes. `say`: one line to a person; `step`: a step's metrics."""

    say: Callable[[str], None]
    step: Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Session:
    """Everything a recipe needs, loaded."""

    recipe: Recipe
    files: ModelFiles
    plan: Plan
    problems: ProblemSet
    policy: Policy
    engine: Engine
    learner: Learner
    verifier: Verifier
    peaks: Peaks


@contextmanager
def open_session(
    recipe: Recipe, report: Reporter, *, training: bool = True, device: torch.device | None = None
) -> Iterator[Session]:
    """Load what a recipe names: cheap things first, so that bad input is refused before weights are read.

    Without `training` only the held-out problems are kept.
    """
    device = device or best_device()
    if device.type == "cpu":
        return_large_blocks()
    files = find_model(recipe.model.name)
    tokenizer = load_tokenizer(files)
    problems = load_problems(recipe.data, tokenizer, recipe.data.max_prompt_tokens)
    for note in problems.notes:
        report.say(note)
    if not training:
        problems = replace(problems, train=[])
    longest_prompt = _longest_prompt(problems)
    _check_room(files, recipe, longest_prompt)
    other = recipe.model.reference
    reference = None if other == "base" else find_model(other)
    divided = divide(files, recipe, longest_prompt, device, reference=reference)
    with Verifier(
        recipe.reward.kind,
        timeout_s=recipe.reward.timeout_s,
        on_timeout=recipe.reward.on_timeout,
        on_error=recipe.reward.on_error,
    ) as verifier:
        problems = _drop_bad_golds(problems, verifier, report)
        policy = load_policy(files, tokenizer, device, form=recipe.model.weights)
        yield Session(
            recipe=recipe,
            files=files,
            plan=divided,
            problems=problems,
            policy=policy,
            engine=_engine(policy, recipe, divided),
            learner=Learner(
                policy.decoder,
                lr=recipe.learner.lr,
                clip=recipe.learner.clip,
                temperature=recipe.rollout.temperature,
                micro_tokens=divided.micro_tokens,
                boundary_every=divided.boundary_every,
                boundary_on_host=divided.boundary_on_host,
                reference=_reference(reference, recipe, policy, divided) if reference else None,
            ),
            verifier=verifier,
            peaks=Peaks(device),
        )


def _reference(files: ModelFiles, recipe: Recipe, policy: Policy, divided: Plan) -> Learner:
    """Another model that scores the policy's rollouts."""
    return Learner(
        load_reference(files, policy),
        lr=recipe.learner.lr,
        clip=None,
        temperature=recipe.rollout.temperature,
        micro_tokens=divided.micro_tokens,
        boundary_on_host=divided.boundary_on_host,
    )


def _check_room(files: ModelFiles, recipe: Recipe, longest_prompt: int) -> None:
    """Raises InputError, before the weights are read, where a prompt leaves no room for the response."""
    config, most = load_config(files), recipe.rollout.max_tokens
    check_supported(config)
    limit = longest_sequence(config)
    if longest_prompt + most > limit:
        raise InputError(
            f"a prompt of {longest_prompt} tokens and rollout.max_tokens = {most} exceed the {limit} tokens "
            f"that {files.name} sees whole: {room_for(longest_prompt, most, limit)} (rollout.max_tokens, "
            "data.max_prompt_tokens)"
        )


def _engine(policy: Policy, recipe: Recipe, divided: Plan) -> Engine:
    strings, compression = recipe.rollout.stop_strings, recipe.rollout.compression
    return Engine(
        policy.decoder,
        divided.slots,
        policy.stop_ids,
        divided.micro_tokens,
        stop_text=StopText(strings, policy.raw_text) if strings else None,
        eviction=Eviction(compression.method, compression.budget, compression.buffer)
        if compression
        else None,
    )


def truncation_of(recipe: Recipe) -> Truncation:
    """Which tokens a recipe's rollouts are drawn from."""
    rollout = recipe.rollout
    return Truncation(top_k=rollout.top_k, top_p=rollout.top_p, min_p=rollout.min_p)


def _longest_prompt(problems: ProblemSet) -> int:
    return max(len(p.prompt_ids) for p in [*problems.train, *problems.heldout])


def divide(
    files: ModelFiles,
    recipe: Recipe,
    longest_prompt: int,
    device: torch.device,
    *,
    reference: ModelFiles | None = None,
    taken_bytes: int = 0,
) -> Plan:
    """The memory plan of a recipe on a device. `taken_bytes` of its budget are in use already."""
    budget = recipe.memory.budget_bytes
    if budget is None:
        cuda = device.type == "cuda"
        budget = torch.cuda.mem_get_info(device)[0] if cuda else host_bytes() * 3 // 4
    else:
        budget -= taken_bytes
    quantised = recipe.model.weights == "int8"
    storage = files.storage_bytes()
    compression = recipe.rollout.compression
    work = Work(
        sequences=recipe.rollout.prompts * recipe.rollout.samples,
        prompt_tokens=longest_prompt,
        response_tokens=recipe.rollout.max_tokens,
        storage_bytes=storage,
        compute_bytes=4 if device.type != "cuda" else 2 if quantised else storage,
        has_host=device.type == "cuda",
        form=recipe.model.weights,
        host_room_bytes=host_bytes() * 3 // 4,
        reference=None if reference is None else Shape.from_config(reference.config),
        kv_entries=compression.entries if compression else None,
        eviction=compression.method if compression else None,
    )
    return plan(Shape.from_config(files.config), work, budget)


def _drop_bad_golds(problems: ProblemSet, verifier: Verifier, report: Reporter) -> ProblemSet:
    """Leave out problems whose gold answer the verifier does not accept for itself, and say which."""
    kept = []
    for name, rows in (("training", problems.train), ("held-out", problems.heldout)):
        bad = verifier.check_golds(rows)
        if bad:
            shown = "; ".join(f"{p.id} {p.answer[:60]!r} ({why})" for p, why in bad[:3])
            report.say(f"{len(bad)} of {len(rows)} {name} problems left out, gold not verifiable: {shown}")
        ids = {problem.id for problem, _ in bad}
        kept.append([p for p in rows if p.id not in ids])
        if rows and not kept[-1]:
            raise InputError(
                f"reward {verifier.kind!r} accepts none of the {name} golds for itself: "
                "is it the right reward for this data?"
            )
    return replace(problems, train=kept[0], heldout=kept[1])


def train(
    session: Session, journal: Journal, report: Reporter, stopped: Callable[[], bool]
) -> dict[str, Any]:
    """Run the recipe's remaining steps; returns the summary that is also written to the run folder.

    `stopped` is asked after every step: True ends the run there, with everything saved.
    """
    recipe, began = session.recipe, time.perf_counter()
    journal.write_json("session.json", {**_planned(session), "environment": examine()})
    if not journal.step:  # the micro-batches of a run that goes on have been through whole steps
        preflight(
            session.learner,
            session.plan,
            recipe.rollout.prompts * recipe.rollout.samples,
            _longest_prompt(session.problems),
            recipe.rollout.max_tokens,
            report.say,
        )
    if not journal.validations:
        report.say(f"held-out accuracy before: {_validate(session, journal, 0)}")
    train_s = sum(row["seconds"] for row in journal.metrics)
    still, silent, interrupted = 0, False, False
    for step in range(journal.step + 1, recipe.train.steps + 1):
        row = _step(session, journal, step, report)
        train_s += row["seconds"]
        report.step(row)
        still = still + 1 if row["signal_groups"] and not row["changed_step"] else 0
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


def _say_still(session: Session, still: int, row: Mapping[str, Any], report: Reporter) -> None:
    """A run whose steps change nothing must say so at once."""
    lr, dtype = session.recipe.learner.lr, session.policy.weights.storage_dtype
    if row.get("rejected_share") == 1.0:
        advice = (
            "the correction rejected every response, so nothing was learned: the sampler's policy is too far "
            f"from the learner's (5 % of tokens have a ratio below {row['xi_p05']:.2g}): compress less"
        )
    elif row["dropped"]:
        advice = f"the step was dropped, the weights are as they were: {row['dropped']}"
    else:
        advice = (
            f"no weight changed: learner.lr = {lr:g} is too small for {str(dtype).removeprefix('torch.')} "
            f"weights at a gradient norm of {row['gradient_norm']:.2g} (an update below half a unit in the "
            f"last place is rounded away). Plain SGD needs about 0.1 for LLMs, 1e-6 is an Adam habit: try "
            f"--set learner.lr={lr * 10:g}"
        )
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
    any_bit, moved = weights.changed_counts()
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
        "changed_step": sum(len(c.position_N) for c in changed.values()),
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
                futures[index] = session.verifier.submit(problems[index // samples], texts[index])
    groups = []
    with clock("verify"):
        for i, problem in enumerate(problems):
            indices = range(i * samples, (i + 1) * samples)
            judgements = [futures[k].result() for k in indices]
            mine = [rollouts[k] for k in indices]
            rewards = [_paid(recipe, r, j) for r, j in zip(mine, judgements, strict=True)]
            groups.append(Group(problem, mine, judgements, rewards))
    _refuse_errors([(problems[k // samples], texts[k], futures[k].result()) for k in sorted(futures)])
    return groups


def _refuse_errors(judged: Sequence[tuple[Problem, str, Judgement]]) -> None:
    """A reward that fails is not a reward of 0: stop, and show an answer that it failed on."""
    failed = [one for one in judged if one[2].verdict is Verdict.ERROR]
    if len(failed) > ERRORS_MOST * len(judged):
        problem, text, judgement = failed[0]
        raise FrugalError(
            f"the reward failed on {len(failed)} of {len(judged)} answers. {problem.id}, gold "
            f"{problem.answer[:200]!r}: {judgement.detail}; the answer was {text[-500:]!r}"
        )


def _paid(recipe: Recipe, rollout: Rollout, judgement: Judgement) -> float:
    share = ALGORITHMS[recipe.loss.algorithm].overlong_share
    if share is None:
        return judgement.reward
    most = recipe.rollout.max_tokens
    buffer = max(1, round(share * most))
    return judgement.reward + overlong_penalty(len(rollout.response_ids), most, buffer)


# --- before and after


def _heldout(session: Session) -> Score:
    """Greedy accuracy on the held-out problems."""
    return evaluate(
        session.policy,
        session.engine,
        session.verifier,
        session.problems.heldout,
        max_tokens=session.recipe.rollout.max_tokens,
        seed=session.recipe.train.seed,
    ).score


def _validate(session: Session, journal: Journal, step: int) -> Score:
    """`_heldout`, noted in the run folder."""
    score = _heldout(session)
    journal.validate(step, asdict(score))
    return score


def _finish(
    session: Session, journal: Journal, train_s: float, began: float, report: Reporter
) -> dict[str, Any]:
    """Write patch.safetensors and summary.json; returns the summary.

    `accuracy_after` is None where the last step was not evaluated, because the run was stopped.
    """
    accuracy = {row["step"]: row["accuracy"] for row in journal.validations}
    weights = session.policy.weights
    any_bit, moved = weights.changed_counts()
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
    form = session.recipe.model.weights
    if form == "int8":
        patch, lost = export(weights, session.files.folder, session.files.name, meta)
        results |= {"export_lost": lost}
    else:
        patch = weights.patch(meta)
    if form != "bf16":  # what was sampled is not what the patch makes of the checkpoint
        exported = _exported(session, patch, report) if journal.step in accuracy else None
        results |= {"accuracy_exported": asdict(exported) if exported else None}
        patch = replace(patch, meta=meta)
    patch_bytes = patch.save(journal.folder / "patch.safetensors")
    summary = {
        **results,
        "best": journal.best(),
        "model": session.files.name,
        "recipe_steps": session.recipe.train.steps,
        "patch": str(journal.folder / "patch.safetensors"),
        "patch_bytes": patch_bytes,
        "train_seconds": train_s,
        "session_seconds": time.perf_counter() - began,
        "peak_memory_bytes": session.peaks.most_bytes,
        **_planned(session),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    journal.write_json("summary.json", summary)
    return summary


def _exported(session: Session, patch: Patch, report: Reporter) -> Score | None:
    """Score a run's patch on the checkpoint in its own format; None if that does not fit."""
    policy, device = session.policy, session.policy.decoder.device
    recipe = replace(session.recipe, model=replace(session.recipe.model, weights="bf16"))
    try:
        divided = divide(
            session.files,
            recipe,
            _longest_prompt(session.problems),
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
    return _heldout(replace(session, policy=policy, engine=_engine(policy, recipe, divided)))


def resume(session: Session, journal: Journal, report: Reporter) -> None:
    """Bring a fresh session to the journal's last step.

    Slots and micro-batches are those of the run, whatever memory is free now: they decide the order of sums.
    """
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
