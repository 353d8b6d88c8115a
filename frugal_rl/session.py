"""Everything that a recipe names, loaded: cheap things first, so that bad input is refused before weights.

recipe -> files, tokenizer, problems -> plan -> policy -> engine, learner, verifier
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from .arms import DENSE
from .baselines import Dense, require
from .config import Recipe
from .curation import Base, drop_bad_golds, drop_never_and_always_solved
from .decoder import check_supported, longest_sequence
from .errors import InputError
from .generate.engine import Engine, room_for
from .generate.eviction import Eviction
from .generate.llamacpp import LlamaEngine, Twin
from .generate.sample import Sampler, StopText, Truncation
from .learn import Learner
from .lora import Adapters, make_baseline
from .memory import Plan, Shape, Work, host_bytes, plan, return_large_blocks, to_divide, with_learner
from .models import ModelFiles, find_model, load_config, load_tokenizer
from .peaks import Peaks
from .policy import Policy, best_device, load_policy, load_reference
from .problems import ProblemSet, load_problems
from .reward import Verifier
from .shortage import Surviving
from .update import make_learner


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
    engine: Sampler
    learner: Learner
    verifier: Verifier
    peaks: Peaks
    baseline: Dense | Adapters | None = None

    def changed_counts(self) -> tuple[int, int]:
        """Entries of the checkpoint that training changed, or that its adapters would once merged."""
        if isinstance(self.baseline, Adapters):
            return self.baseline.changed_counts(self.files.folder)
        return self.policy.weights.changed_counts()


@contextmanager
def open_session(
    recipe: Recipe,
    report: Reporter,
    *,
    training: bool = True,
    device: torch.device | None = None,
    solved: Mapping[str, tuple[int, int]] | None = None,
) -> Iterator[Session]:
    """Load what a recipe names: cheap things first, so that bad input is refused before weights are read.

    Without `training` only the held-out problems are kept. `solved`: what a run that goes on has measured.
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
    longest = longest_prompt(problems)
    _check_room(files, recipe, longest)
    other = recipe.model.reference
    reference = None if other == "base" else find_model(other)
    divided = divide(files, recipe, longest, device, reference=reference)
    with Verifier(
        recipe.reward.kind,
        timeout_s=recipe.reward.timeout_s,
        on_timeout=recipe.reward.on_timeout,
        on_error=recipe.reward.on_error,
    ) as verifier:
        problems = drop_bad_golds(problems, verifier, report.say)
        kind = recipe.learner.kind if training else "sgd"
        require(kind)
        form = recipe.model.weights
        policy = load_policy(files, tokenizer, device, form=form, whole=kind in DENSE)
        engine = make_engine(policy, recipe, divided, report.say)
        if training and recipe.data.solve_samples is not None:
            base = Base(recipe, policy, engine, verifier, truncation_of(recipe))
            problems = drop_never_and_always_solved(problems, base, report.say, solved or {})
        baseline = make_baseline(
            kind,
            policy.decoder,
            lr=recipe.learner.lr,
            clip=recipe.learner.clip,
            momentum=recipe.learner.momentum,
            rank=recipe.learner.rank,
            alpha=recipe.learner.alpha,
            seed=recipe.train.seed,
        )
        yield Session(
            recipe=recipe,
            files=files,
            plan=divided,
            problems=problems,
            policy=policy,
            engine=engine,
            learner=make_learner(
                policy.decoder,
                recipe,
                divided,
                reference=load_reference(reference, policy) if reference else None,
                baseline=baseline,
            ),
            verifier=verifier,
            baseline=baseline,
            peaks=Peaks(device),
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


def make_engine(policy: Policy, recipe: Recipe, divided: Plan, say: Callable[[str], None]) -> Sampler:
    strings, compression = recipe.rollout.stop_strings, recipe.rollout.compression
    stop_text = StopText(strings, policy.raw_text) if strings else None
    kind = recipe.rollout.gguf_format
    if kind is not None:
        if compression is not None:
            raise InputError(
                'rollout.generator = "llama.cpp" evicts nothing from its cache: leave kv_budget out'
            )
        on_gpu = policy.decoder.device.type == "cuda"
        twin = Twin(policy.weights, policy.files.config, kind, on_gpu=on_gpu)
        llama = LlamaEngine(policy.decoder, twin, divided.slots, policy.stop_ids, stop_text)
        return Surviving(llama, policy.decoder.device, say)
    engine = Engine(
        policy.decoder,
        divided.slots,
        policy.stop_ids,
        divided.micro_tokens,
        stop_text=stop_text,
        eviction=Eviction(compression.method, compression.budget, compression.buffer)
        if compression
        else None,
    )
    return Surviving(engine, policy.decoder.device, say)


def truncation_of(recipe: Recipe) -> Truncation:
    """Which tokens a recipe's rollouts are drawn from."""
    rollout = recipe.rollout
    return Truncation(top_k=rollout.top_k, top_p=rollout.top_p, min_p=rollout.min_p)


def longest_prompt(problems: ProblemSet) -> int:
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
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what PyTorch keeps of freed memory is not free for CUDA
            budget = to_divide(torch.cuda.mem_get_info(device)[0])
        else:
            budget = host_bytes() * 3 // 4
    else:
        budget -= taken_bytes
    quantised = recipe.model.weights == "int8"
    storage, shape = files.storage_bytes(), Shape.from_config(files.config)
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
        gguf=recipe.rollout.gguf_format,
    )
    return plan(shape, with_learner(work, shape, recipe.learner.kind, recipe.learner.rank), budget)
