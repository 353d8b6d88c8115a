"""The command line: parse, call, print. Exit codes: 0 done, 1 failed while running, 2 refused (bad input).

With `--json` one JSON object goes to standard output and nothing else does. Heavy modules are imported by
the command that needs them.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from .arms import check_resumable, forms_of
from .cli_analyse import analyse, report
from .cli_compare import compare
from .cli_export import export
from .cli_patch import patch, print_result
from .cli_reward import reward
from .config import (
    LEAST_KV_BUDGET,
    Recipe,
    check_compression,
    list_recipes,
    load_recipe,
    parse_bytes,
    read_recipe,
    toml_value,
)
from .console import Console, size
from .errors import FrugalError, InputError

Overrides = tuple[str, ...]
DEFAULT_RECIPE = "tiny"
PLAN_RECIPE = "math-qwen2.5-7b-24gib"  # batch and lengths of a plan that names a model alone
PLAN_MEMORY = "24GiB"  # one consumer GPU
RESUMABLE = frozenset({"train.steps", "train.eval_every", "train.log", "memory.budget"})


def main() -> None:
    """Entry point: our errors become one line and an exit code."""
    # GNU OpenMP spins at barriers by default, which is ten times slower as soon as one core is taken by
    # another process; with so short a spin nothing is lost on an idle machine. Read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Blocks from 2 MiB in huge pages: freed ones go back to the system at once (memory.return_large_blocks),
    # and getting them anew took a fifth of a 0.5B step's time in pages of 4 KiB. Read when torch is loaded.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # On a GPU, freed neighbours become one free range, whatever their sizes: the learner's tensors go where
    # the KV pool was (torch otherwise keeps blocks by size: one phase's do not suit the other's). The older
    # name, if it is set, would be overruled by this one.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        cli(standalone_mode=False)
    except InputError as error:
        _fail(error, 2)
    except FrugalError as error:
        _fail(error, 1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail("stopped", 130)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"no space left on the disk{where}: free some and run the command again", 1)


def _fail(error: object, code: int) -> None:
    click.echo(f"error: {error}", err=True)
    sys.exit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="frugal-rl")
def cli() -> None:
    """Reinforcement learning of ALL parameters of a language model on one consumer GPU.

    What is learned leaves as a small patch file that turns the base model into the trained one, bit for bit.
    """


cli.add_command(compare)
cli.add_command(patch)
cli.add_command(export)
cli.add_command(reward)
cli.add_command(analyse)
cli.add_command(report)


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--recipe, --model, --data, --seed and --set, in this order of precedence (the last wins)."""
    for option in (
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key."),
        click.option("--seed", type=int, help="Short for --set train.seed=N."),
        click.option("--data", help="Short for --set data.source=...: rows or a built-in task."),
        click.option("--model", help="Short for --set model.name=...: a folder or hub name."),
        click.option("--recipe", metavar="NAME|FILE", help="See `frugal-rl recipes`."),
    ):
        command = option(command)
    return command


def _overrides(model: str | None, data: str | None, seed: int | None, rest: Overrides) -> list[str]:
    short = {"model.name": model, "data.source": data, "train.seed": seed}
    return [*(f"{k}={toml_value(v)}" for k, v in short.items() if v is not None), *rest]


# --- train


@cli.command()
@recipe_options
@click.option(
    "--generator", type=click.Choice(["engine", "llama.cpp"]), help="Short for --set rollout.generator=..."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Run folder [runs/RECIPE-N].")
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Go on with a run.")
@click.option("--force", is_flag=True, help="Replace the run folder if it exists.")
@click.option("--log", metavar="SINK", help="Short for --set train.log=...: tensorboard, trackio or wandb.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def train(
    recipe: str | None,
    model: str | None,
    data: str | None,
    seed: int | None,
    overrides: Overrides,
    generator: str | None,
    output: Path | None,
    resume: Path | None,
    force: bool,
    log: str | None,
    as_json: bool,
) -> None:
    """Train a model by RL; with no argument, the embedded one, in about a minute.

    Ctrl-C ends after the current step with everything saved.
    """
    from .journal import Journal

    if generator is not None:
        overrides = (f"rollout.generator={toml_value(generator)}", *overrides)
    changes = _overrides(model, data, seed, overrides)
    changes += [f"train.log={toml_value(log)}"] if log is not None else []
    if resume is not None:
        if recipe is not None or output is not None or force:
            raise InputError("--resume takes its recipe and folder from the run; leave the others out")
        journal, config = Journal.open(resume)
        check_resumable(config.learner.kind, resume)
        config = _changed_on_resume(config, changes)
    else:
        config = load_recipe(recipe or DEFAULT_RECIPE, changes)
        folder = output or _free_folder(Path(recipe or DEFAULT_RECIPE).stem)
        if folder.exists() and not force:
            Journal.create(folder, config, force=False)  # raises, before anything is loaded
        journal = Journal(folder)
    summary = _run(config, journal, resumed=resume is not None, force=force)
    print_result(summary, as_json, lambda: _closing(summary, journal.folder))


def _run(config: Recipe, journal: Any, *, resumed: bool, force: bool) -> dict[str, Any]:
    from . import train as loop
    from .curation import read_run_file, run_files
    from .journal import Journal
    from .patch import write_atomically
    from .session import open_session
    from .sinks import check_sink, open_sink

    check_sink(config.train.log)
    with Console(config.train.steps, f"frugal-rl · {config.model.name}") as console:
        report = loop.Reporter(console.say, console.step)
        solved = read_run_file(journal.folder).get("solved") if resumed else None
        with open_session(config, report, solved=solved) as session, _interrupts(console.say) as stopped:
            if resumed:
                loop.resume(session, journal, report)
                write_atomically(journal.folder / "recipe.toml", config.to_toml().encode())
                console.say(f"{journal.folder}: going on after step {journal.step}")
            else:
                files = run_files(session.problems)
                journal = Journal.create(journal.folder, config, force=force, files=files)
                if "left_out.jsonl" in files:
                    lines = len(session.problems.left_out)
                    console.say(f"{journal.folder}/left_out.jsonl lists the {lines} problems left out")
            try:
                with open_sink(config, journal, console.say) as send:

                    def step(row: Mapping[str, Any]) -> None:
                        console.step(row)
                        send()

                    return loop.train(session, journal, replace(report, step=step), stopped)
            except (OSError, FrugalError, KeyboardInterrupt):
                further = f"; go on with: frugal-rl train --resume {journal.folder}"
                plain = config.learner.kind == "sgd"
                console.say(
                    f"{journal.folder} is complete up to step {journal.step}{further if plain else ''}"
                )
                raise


def _changed_on_resume(config: Recipe, changes: Sequence[str]) -> Recipe:
    fixed = [c for c in changes if c.partition("=")[0].strip() not in RESUMABLE]
    if fixed:
        raise InputError(
            f"--resume with {fixed[0]}: a run keeps its recipe; only these can change: "
            f"{', '.join(sorted(RESUMABLE))}"
        )
    return read_recipe(config.to_toml(), changes, where="the run's recipe.toml")


def _free_folder(stem: str) -> Path:
    number = 1
    while (path := Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return path


@contextmanager
def _interrupts(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C asks to stop after the step, the second stops at once."""
    asked: list[bool] = []

    def handle(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        say("stopping after this step (Ctrl-C again: now; committed steps are safe either way)")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def _closing(summary: dict[str, Any], folder: Path) -> str:
    """The last lines of a run."""
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    entries = summary["changed_any"]
    each = f" ({summary['patch_bytes'] / entries:.2f} bytes per changed entry)" if entries else ""
    share = entries / summary["parameters"]
    more = summary["recipe_steps"] * 2 if summary["steps"] >= summary["recipe_steps"] else None
    go_on = f"frugal-rl train --resume {folder}" + (f" --set train.steps={more}" if more else "")

    def interval(score: dict[str, Any] | None) -> str:
        if score is None:
            return "not measured, the run was stopped"
        return f"{score['value']:.1%} (95 %: {score['low']:.1%} to {score['high']:.1%})"

    lines = [f"held-out accuracy  {interval(before)} -> {interval(after)}, {before['problems']} problems"]
    if "accuracy_exported" in summary:  # what was sampled is not the checkpoint with the patch
        score, lost = summary["accuracy_exported"], summary.get("export_lost")
        share_lost = (lost or 0) / max(1, entries)
        exact = "exact" if lost is None else f"{lost:,} changed entries ({share_lost:.2%}) lost to rounding"
        if "merge_lost" in summary:
            exact = f"merging rounds away {summary['merge_lost']:.1%} of the adapters' update (norm)"
        lines.append(
            f"exported           checkpoint + patch: {interval(score) if score else 'not measured'}; {exact}"
        )
    lines += [
        f"steps              {summary['steps']} in {summary['train_seconds']:.0f} s, "
        f"peak memory {size(summary['peak_memory_bytes'])}, "
        f"planned {size(summary['planned_memory_bytes'])}",
        f"changed entries    {entries:,} of {summary['parameters']:,} ({share:.2%}) in any bit, "
        f"{summary['changed_1e5']:,} by more than 1e-5",
        f"patch              {summary['patch']}, {summary['patch_bytes']:,} bytes{each}",
    ]
    if "adapter_bytes" in summary:
        lines.append(f"adapter            {folder / 'adapter'}, {summary['adapter_bytes']:,} bytes (peft)")
    best = summary["best"]
    if 0 < best["step"] < summary["steps"] and "adapter_bytes" not in summary:
        lines.append(
            f"best evaluation    step {best['step']}, {best['accuracy']['value']:.1%}: "
            f"frugal-rl patch at {folder} --step {best['step']} -o best.safetensors"
        )
    return "\n".join(
        [
            *lines,
            f"apply it           frugal-rl patch apply {summary['model']} {summary['patch']} -o trained",
            f"evaluate it        frugal-rl eval --patch {summary['patch']}",
            *([f"go on              {go_on}"] if summary["kind"] == "sgd" else []),
        ]
    )


# --- plan


@cli.command("plan")
@click.argument("model", required=False)
@click.option("--recipe", metavar="NAME|FILE", help="Where the values below come from if not given.")
@click.option("--memory", metavar="SIZE", help="The budget, such as 24GiB.")
@click.option(
    "--host-memory", metavar="SIZE", help="That a GPU's host can spare [3/4 of this machine's memory]."
)
@click.option("--device", type=click.Choice(["gpu", "cpu"]), default="gpu", help="[gpu]")
@click.option("--prompts", type=click.IntRange(1), help="Prompts a step.")
@click.option("--samples", type=click.IntRange(1), help="Responses to each prompt.")
@click.option("--prompt-tokens", type=click.IntRange(1), help="Of the longest prompt.")
@click.option("--max-tokens", type=click.IntRange(1), help="Of a response.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan_command(
    model: str | None,
    recipe: str | None,
    memory: str | None,
    host_memory: str | None,
    device: str,
    prompts: int | None,
    samples: int | None,
    prompt_tokens: int | None,
    max_tokens: int | None,
    as_json: bool,
) -> None:
    """Say what fits before anything is loaded, from the config.json of MODEL alone.

    MODEL is a folder, a hub name or a known model such as Qwen2.5-7B. Without --recipe, a MODEL gets the
    lengths of math-qwen2.5-7b-24gib. Exit code 2 if it does not fit in the form the recipe asks for.
    """
    from . import memory as planner
    from .shapes import find_shape

    config = load_recipe(recipe or (PLAN_RECIPE if model else DEFAULT_RECIPE))
    if model and not recipe:
        whole = replace(config.model, weights="bf16")
        config = replace(config, model=whole, rollout=replace(config.rollout, kv_budget=None))
    model = model or config.model.name
    shape, storage_bytes = find_shape(model)
    prompts, samples = prompts or config.rollout.prompts, samples or config.rollout.samples
    on_gpu = device == "gpu"
    budget = parse_bytes(memory) if memory is not None else config.memory.budget_bytes
    if budget is None:
        budget = parse_bytes(PLAN_MEMORY) if on_gpu else planner.host_bytes() * 3 // 4
    compression = config.rollout.compression
    host_room = parse_bytes(host_memory) if host_memory else planner.host_bytes() * 3 // 4
    work = planner.Work(
        sequences=prompts * samples,
        prompt_tokens=prompt_tokens or config.data.max_prompt_tokens,
        response_tokens=max_tokens or config.rollout.max_tokens,
        storage_bytes=storage_bytes,
        compute_bytes=storage_bytes if on_gpu else planner.FLOAT32_BYTES,
        has_host=on_gpu,
        host_room_bytes=host_room,
        kv_entries=compression.entries if compression else None,
        eviction=compression.method if compression else None,
        gguf=config.rollout.gguf_format,
    )
    kind = config.learner.kind
    work = planner.with_learner(work, shape, kind, config.learner.rank)
    works = {name: replace(work, form=name) for name in planner.FORMS if name in forms_of(kind)}
    plans = {form: planner.lay_out(shape, w, budget) for form, w in works.items()}
    would = {
        form: None if p.fits else planner.what_would(shape, works[form], budget) for form, p in plans.items()
    }
    value = {
        "model": model,
        "parameters": shape.parameters,
        "device": device,
        "budget_bytes": budget,
        "host_room_bytes": host_room if on_gpu else None,
        "prompts": prompts,
        "samples": samples,
        "prompt_tokens": work.prompt_tokens,
        "max_tokens": work.response_tokens,
        "forms": {form: {**p.as_json(), "would": would[form]} for form, p in plans.items()},
    }

    def text() -> str:
        head = (
            f"{model}: {planner.count(shape.parameters)} parameters; {device}, {size(budget)}"
            f"{f', its host {size(host_room)}' if on_gpu else ''}; "
            f"{prompts} prompts x {samples} samples, "
            f"up to {work.prompt_tokens} + {work.response_tokens} tokens"
        )
        advice = [f"{form}: {ways}" for form, ways in would.items() if ways is not None]
        return "\n".join([head, "", planner.table(plans), "", *advice]).rstrip()

    print_result(value, as_json, text)
    if not plans[config.model.weights].fits:
        sys.exit(2)


# --- eval


@cli.command("eval")
@recipe_options
@click.option("--patch", type=click.Path(path_type=Path), help="Evaluate base + this patch.")
@click.option("--samples", type=click.IntRange(1), default=1, help="Answers a problem [1].")
@click.option("--temperature", type=click.FloatRange(0), help="[0 for one answer, 1 for more]")
@click.option("--pass-at", "ks", multiple=True, type=click.IntRange(1), help="pass@k; repeatable.")
@click.option("--problems", type=click.IntRange(1), help="Only the first so many held-out problems.")
@click.option("--kv-budget", type=click.IntRange(1), help="Entries that stay of a full KV cache.")
@click.option("--kv-buffer", type=click.IntRange(1), help="Entries besides, until it is full [128].")
@click.option("--eviction", type=click.Choice([*LEAST_KV_BUDGET, "none"]), help="Which ones stay [rkv].")
@click.option("--show", type=click.IntRange(0), default=0, help="Print so many answers.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate_command(
    recipe: str | None,
    model: str | None,
    data: str | None,
    seed: int | None,
    overrides: Overrides,
    patch: Path | None,
    samples: int,
    temperature: float | None,
    ks: tuple[int, ...],
    problems: int | None,
    kv_budget: int | None,
    kv_buffer: int | None,
    eviction: str | None,
    show: int,
    as_json: bool,
) -> None:
    """Accuracy or pass@k on the held-out problems, of a base with or without a patch.

    A patch brings the recipe it was trained with; --recipe replaces it. The KV cache is compressed as the
    recipe says: --kv-budget, --kv-buffer and --eviction replace that; --eviction none keeps every entry.
    """
    from . import train as loop
    from .evaluate import evaluate
    from .patch import Patch
    from .session import open_session, truncation_of

    if any(k > samples for k in ks):
        raise InputError(f"--pass-at {max(ks)} needs --samples of at least {max(ks)}, got {samples}")
    loaded = Patch.load(patch) if patch is not None else None
    changes = _overrides(model, data, seed, overrides)
    if recipe is None and loaded is not None and "recipe" in loaded.meta:
        # a run's patch is for the checkpoint itself, also that of a run on its int8 form
        config = read_recipe(loaded.meta["recipe"], ["model.weights=bf16", *changes], where=str(patch))
        if not any(change.startswith("rollout.generator") for change in changes):
            config = replace(config, rollout=replace(config.rollout, generator="engine", gguf=None))
    else:
        config = load_recipe(recipe or DEFAULT_RECIPE, changes)
    config = _with_cache(config, kv_budget=kv_budget, kv_buffer=kv_buffer, eviction=eviction)
    report = loop.Reporter(lambda text: click.echo(text, err=True), lambda row: None)
    with open_session(config, report, training=False) as session:
        if loaded is not None:
            session.policy.weights.write_patch_(loaded)
        result = evaluate(
            session.policy,
            session.engine,
            session.verifier,
            session.problems.heldout[:problems],
            max_tokens=config.rollout.max_tokens,
            samples=samples,
            temperature=temperature if temperature is not None else float(samples > 1),
            truncation=truncation_of(config),
            ks=ks,
            seed=config.train.seed,
        )
    compression = config.rollout.compression
    for answer in result.answers[:show]:
        verdict = f"[{answer.judgement.verdict.value}; answer: {answer.problem.answer}]"
        click.echo(f"{answer.problem.prompt}{answer.response}\n{verdict}\n", err=True)
    value = {
        "model": config.model.name,
        "patch": str(patch) if patch is not None else None,
        "accuracy": asdict(result.score),
        "pass_at": {str(k): asdict(score) for k, score in result.passes.items()},
        "samples": samples,
        "verdicts": result.verdicts,
        "response_tokens": result.response_tokens,
        "truncated": result.truncated,
        "kv_cache": asdict(compression) if compression else None,
    }

    def text() -> str:
        lines = [f"accuracy   {result.score}"]
        lines += [f"pass@{k:<6} {score}" for k, score in result.passes.items()]
        verdicts = ", ".join(f"{name} {count}" for name, count in sorted(result.verdicts.items()))
        length = f"{result.response_tokens:.1f} tokens, {result.truncated:.1%} truncated"
        lines += [f"verdicts   {verdicts}", f"responses  {length}"]
        if compression:
            lines.append(
                f"KV cache   {compression.method}, {compression.budget} + {compression.buffer} entries"
            )
        return "\n".join(lines)

    print_result(value, as_json, text)


def _with_cache(config: Recipe, **given: Any) -> Recipe:
    """The recipe with another KV cache. A policy may be measured under one it could not be trained with."""
    changed = {key: value for key, value in given.items() if value is not None}
    rollout = replace(config.rollout, **changed)
    check_compression(rollout, " ".join(f"--{k.replace('_', '-')} {v}" for k, v in changed.items()))
    return replace(config, rollout=rollout)


# --- recipes, doctor


@cli.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def recipes(name: str | None, as_json: bool) -> None:
    """List the recipes, or show one in full, every default written out."""
    if name is None:
        known = list_recipes()
        blocks = [f"{key}\n" + "\n".join(f"    {x}" for x in v.splitlines()) for key, v in known.items()]
        print_result(known, as_json, lambda: "\n\n".join(blocks))
        return
    recipe = load_recipe(name)
    header = list_recipes().get(name, "")
    comment = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
    print_result(asdict(recipe), as_json, lambda: f"{comment}\n{recipe.to_toml()}".strip())


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Print what a bug report needs: versions, devices, memory, extras."""
    from .doctor import examine

    found = examine()

    def text() -> str:
        lines = []
        for key, value in found.items():
            if isinstance(value, dict):
                lines += [f"{key}:"] + [f"  {k:<22} {_plain(v)}" for k, v in value.items()]
            elif isinstance(value, list):
                lines += [f"{key}:"] + [f"  {_plain(v)}" for v in value or ["none"]]
            else:
                shown = size(value) if key.endswith("_bytes") else _plain(value)
                lines.append(f"{key:<24} {shown}")
        return "\n".join(lines)

    print_result(found, as_json, text)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {size(v) if k.endswith('_bytes') else _plain(v)}" for k, v in value.items())
    return "not installed" if value is None else str(value)
