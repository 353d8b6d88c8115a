"""Whole RL steps of a 7B or 14B shape on a GPU under a memory cap: seconds and peak by phase; or a leak hunt.

    python tools/bench_loop.py --runs Qwen2.5-7B:int8 --kv-budget 512
    python tools/bench_loop.py --runs Qwen2.5-7B:bf16        # and Qwen2.5-14B:int8
    python tools/bench_loop.py --runs Qwen2.5-1.5B:int8 --cap 6GiB --leak --steps 200 --prompts 8 \\
        --max-tokens 48
    python tools/bench_loop.py --device cpu --runs small:int8,small:bf16 --steps 2 --prompts 2 --samples 4 \\
        --max-tokens 12

Generate, verify, learn, commit, journal: the steps that `frugal-rl train` runs, with the plan's own slots and
micro-batches. Random weights of the real shape are made on the device (bench_learn.py), the problems are the
built-in task's in the embedded model's tokenizer, with a name for every other token of the vocabulary, and
the reward is a coin that a checksum of the response throws: random weights earn nothing else, and a step
without signal would not be learned from. Such a policy hardly ever stops, so responses have --max-tokens.

Each run is a process of its own under the cap, in which no step begins after --seconds: a call with one run
is to take at most ten minutes. With --leak the bytes of all tensors after each step, without the patch's,
must not grow by more than 1 % from the first tenth of the steps to the last; else the exit code is 1.

Limits: 7B int8 12 GiB with a budget of 512 entries, 7B bf16 and 14B int8 20 GiB. Not measured on a GPU yet.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # also where a worker imports this file for its `coin`

GROWTH = 0.01  # of what is held: the allocator's rounding of a patch that grows


def coin(problem: dict[str, Any], response: str) -> float:
    """0 or 1, the same for the same response."""
    return float(zlib.crc32(response.encode()) % 2)


def write_folder(folder: Path, config: Any) -> None:
    """Config, tokenizer and one stored entry, from which the format is read: a checkpoint without weights."""
    import torch
    from safetensors.torch import save_file

    from frugal_rl.models import EMBEDDED

    for path in EMBEDDED["tiny"].iterdir():
        if path.name.startswith(("tokenizer", "generation_config")):
            (folder / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    taken = {*vocabulary.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    vocabulary.update({f"t{i}": i for i in range(config.vocab_size) if i not in taken})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config.save_pretrained(folder)
    save_file({"entry": torch.zeros(1, dtype=torch.bfloat16)}, folder / "model.safetensors")


def make_recipe(options: argparse.Namespace, folder: Path, form: str) -> Any:
    from frugal_rl.config import load_recipe, parse_bytes
    from frugal_rl.memory import to_divide

    chosen = {
        "model.name": json.dumps(str(folder)),
        "model.weights": json.dumps(form),
        "reward.kind": json.dumps(f"{Path(__file__).resolve()}:coin"),
        "rollout.prompts": options.prompts,
        "rollout.samples": options.samples,
        "rollout.max_tokens": options.max_tokens,
        "learner.lr": options.lr,
        "train.steps": options.steps,
        "memory.budget": json.dumps(f"{to_divide(parse_bytes(options.cap)) >> 20}MiB"),
    }
    if options.kv_budget:
        chosen["rollout.kv_budget"] = options.kv_budget
    return load_recipe("tiny", [f"{key}={value}" for key, value in chosen.items()])


def held_bytes(device: Any) -> int:
    """Of all tensors on the device, now."""
    import torch

    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    gc.collect()
    with warnings.catch_warnings(action="ignore"):  # of what is only looked at
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in gc.get_objects()
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta
        }
    return sum(storages.values())


def resident_bytes() -> int:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def run_one(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from bench_learn import about, capped, make_config, make_weights, shape_of

    from frugal_rl.config import parse_bytes
    from frugal_rl.decoder import Decoder
    from frugal_rl.errors import FrugalError
    from frugal_rl.journal import Journal
    from frugal_rl.memory import peak_resident_bytes
    from frugal_rl.models import find_model, load_tokenizer, stop_ids
    from frugal_rl.patch import BaseInfo
    from frugal_rl.peaks import Peaks
    from frugal_rl.policy import Policy
    from frugal_rl.problems import load_problems
    from frugal_rl.reward import Verifier
    from frugal_rl.session import Reporter, Session, divide, longest_prompt, make_engine
    from frugal_rl.train import _step
    from frugal_rl.update import make_learner, preflight

    name, _, form = options.runs.partition(":")
    device, shape = torch.device(options.device), shape_of(name)
    capped(device, parse_bytes(options.cap))
    config = make_config(shape)
    row = {"run": options.runs, "cap": options.cap, "kv_budget": options.kv_budget, **about(device)}
    reporter = Reporter(say=lambda line: print(line, file=sys.stderr), step=lambda metrics: None)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "random"
        folder.mkdir()
        write_folder(folder, config)
        recipe = make_recipe(options, folder, form)
        files = find_model(str(folder))
        tokenizer = load_tokenizer(files)
        problems = load_problems(recipe.data, tokenizer, recipe.data.max_prompt_tokens)
        planned = divide(files, recipe, longest_prompt(problems), device)
        held = 0 if device.type == "cuda" else peak_resident_bytes()
        weights = make_weights(config, form, device)
        weights.base_info = BaseInfo("random", {})
        policy = Policy(files, Decoder(config, weights), tokenizer, stop_ids(files, tokenizer), held)
        row |= {"planned": {"generating": dict(planned.generating), "learning": dict(planned.learning)}}
        row |= {"planned_bytes": {"generate": planned.generating_bytes, "learn": planned.learning_bytes}}
        row |= {"slots": planned.slots, "micro_tokens": planned.micro_tokens, "weights_bytes": weights.nbytes}
        with Verifier(recipe.reward.kind) as verifier:
            session = Session(
                recipe=recipe,
                files=files,
                plan=planned,
                problems=problems,
                policy=policy,
                engine=make_engine(policy, recipe, planned, reporter.say),
                learner=make_learner(policy.decoder, recipe, planned),
                verifier=verifier,
                peaks=Peaks(device),
            )
            journal = Journal.create(Path(place) / "run", recipe, force=False)
            sequences = recipe.rollout.prompts * recipe.rollout.samples
            longest = longest_prompt(problems)
            began = time.perf_counter()
            try:
                preflight(
                    session.learner, planned, sequences, longest, recipe.rollout.max_tokens, reporter.say
                )
                steps = []
                for number in range(1, options.steps + 1):
                    metrics = _step(session, journal, number, reporter)
                    patch = sum(overlay.nbytes for overlay in weights.overlay.values())
                    held_now = {"held_bytes": held_bytes(device) - patch, "resident_bytes": resident_bytes()}
                    steps.append({**metrics, **held_now, "patch_bytes": patch})
                    if time.perf_counter() - began > options.seconds:
                        break
            except (torch.OutOfMemoryError, FrugalError) as error:
                if "out of memory" not in str(error):
                    raise
                return {**row, "out_of_memory": str(error).split(". ")[0]}
    return {**row, **summary(steps, held), "seconds": time.perf_counter() - began}


def summary(steps: list[dict[str, Any]], held: int) -> dict[str, Any]:
    """Of all steps but the first, which compiles, where there are several."""
    later = steps[1:] or steps
    phases = later[0]["phase_seconds"]
    tenth = max(1, len(steps) // 10)
    first, last = (max(s["held_bytes"] for s in part) for part in (steps[:tenth], steps[-tenth:]))
    return {
        "steps": len(steps),
        "phase_seconds": {name: sum(s["phase_seconds"][name] for s in later) / len(later) for name in phases},
        "phase_peak_bytes": {
            name: max((s["phase_peak_bytes"].get(name) or 0) for s in later) - held for name in phases
        },
        "tokens_per_s": sum(s["tokens_per_s"] for s in later) / len(later),
        "response_tokens": sum(s["response_tokens"] for s in later) / len(later),
        "changed_step": later[-1]["changed_step"],
        "dropped": sum(s["dropped"] is not None for s in steps),
        "patch_bytes": steps[-1]["patch_bytes"],
        "held_first_bytes": first,
        "held_last_bytes": last,
        "resident_first_bytes": steps[tenth - 1]["resident_bytes"],
        "resident_last_bytes": steps[-1]["resident_bytes"],
        "grew": last > first * (1 + GROWTH),
    }


def said(row: dict[str, Any]) -> str:
    from frugal_rl.console import size

    if "out_of_memory" in row:
        return f"does not fit: {row['out_of_memory']}"
    phases = ", ".join(
        f"{name} {seconds:.1f} s (peak {size(row['phase_peak_bytes'][name])}"
        + (f", planned {size(row['planned_bytes'][name])})" if name in row["planned_bytes"] else ")")
        for name, seconds in row["phase_seconds"].items()
    )
    speed = f"{row['tokens_per_s']:.0f} tokens/s"
    return (
        f"{row['steps']} steps, {row['slots']} slots: {phases}; generated {speed}; "
        f"held {size(row['held_first_bytes'])} -> {size(row['held_last_bytes'])} beside a patch of "
        f"{size(row['patch_bytes'])}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", default="Qwen2.5-7B:int8,Qwen2.5-7B:bf16,Qwen2.5-14B:int8")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--kv-budget", type=int, help="entries of a slot [all]")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--cap", default="24GiB")
    parser.add_argument("--seconds", type=float, default=480, help="no step begins after so many")
    parser.add_argument("--leak", action="store_true", help="fail where the memory that is held grows")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="append a line a run to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the command line does
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if options.one:
        print(json.dumps(run_one(argparse.Namespace(**json.loads(options.one)))))
        return
    from bench_learn import in_a_process, keep

    grew = False
    for run in options.runs.split(","):
        row = in_a_process(__file__, options, runs=run)
        print(f"{run:<18} {said(row) if row else 'failed'}", flush=True)
        grew |= row is None or bool(row.get("grew", True))
        if row:
            keep(options.json, row)
    if options.leak and grew:
        sys.exit("memory grew, or a run failed")


if __name__ == "__main__":
    main()
