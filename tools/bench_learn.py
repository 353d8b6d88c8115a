"""One learner step of a 7B or 14B shape on a GPU under a memory cap: seconds, peak by phase, and the plan.

    python tools/bench_learn.py [--runs rates,Qwen2.5-7B:int8,Qwen2.5-7B:bf16,Qwen2.5-14B:int8] [--cap 24GiB]
    python tools/bench_learn.py --runs rates,Qwen2.5-1.5B:int8,Qwen2.5-1.5B:sgd,Qwen2.5-1.5B:adamw8bit
    python tools/bench_learn.py --runs rates,Qwen2.5-7B:int8,Qwen2.5-7B:lora
    python tools/bench_learn.py --device cpu --runs rates,small:int8,small:bf16,small:sgd,small:lora \\
        --sequences 4 --tokens 32

Random weights of the real shape are made on the device, tensor by tensor (int8: random codes and one scale),
so nothing is downloaded. 128 sequences of 1024 tokens, the first quarter of each the prompt, are learned in
one step. Each run is a process of its own under the cap. A call is to take at most ten minutes: name fewer
runs if it does not.

    rates       what the machine does: bf16 products (8192 cubed), a copy; and, against that copy, the bytes
                that dequantise and propose have to move (codes, gradient and weights read once, one write),
                for a 7B shape's largest matrix of a layer and for its head. A propose ends in a sync, and
                Python's part of it counts: what the kernels do shows best at the head
    NAME:int8, NAME:bf16     this learner, with the plan's own choices, twice from the same weights: the first
                step has a clock and a peak for each phase, the second is timed as it is; do they agree?
    NAME:sgd, NAME:adamw8bit   transformers' model with gradient checkpointing, --peer-sequences at a time
    NAME:lora   the same with peft, r = 16 on all linear layers, AdamW

The share is that of the rate that `rates` measured in the same call, counting 8 FLOPs for every parameter and
token; for LoRA too, which computes 6. Limits: 7B int8 12 GiB, 7B bf16 and 14B int8 20 GiB; 45 % of the rate
for 7B int8; 70 % of the copy for dequantise and propose. Not measured on a GPU yet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from frugal_rl.config import parse_bytes
from frugal_rl.console import size
from frugal_rl.memory import Shape, Work, host_bytes, peak_resident_bytes, plan, to_divide
from frugal_rl.shapes import find_shape

SCALE = 0.02  # of the loss: the norm is then below the clip, as in training
SMALL = Shape(2, 64, 112, 4, 2, 16, 1000, tied=False)  # to try the script itself
PHASES = ("_embed", "_through", "_head", "_norm_backward", "_backward")  # of the learner, as it calls them


def shape_of(name: str) -> Shape:
    return SMALL if name == "small" else find_shape(name)[0]


def make_config(shape: Shape) -> Any:
    """A Qwen2 config of that shape."""
    from transformers import AutoConfig

    assert shape.head_size * shape.heads == shape.hidden
    return AutoConfig.for_model(
        "qwen2",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=None,
    )


def make_weights(config: Any, form: str, device: Any) -> Any:
    """Random weights on the device, the norms 1."""
    import torch

    from frugal_rl.decoder import build_skeleton, parameter_names
    from frugal_rl.storage import Quantised
    from frugal_rl.weights import Weights

    names, tensors = parameter_names(config), {}
    torch.manual_seed(0)
    for name, parameter in build_skeleton(config).named_parameters():
        if name not in names:
            continue
        shape = tuple(parameter.shape)
        if form == "int8" and len(shape) == 2:
            code_OI = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
            tensors[name] = Quantised(code_OI, torch.full((shape[0],), 0.035, device=device))
            continue
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
        tensors[name] = tensor.fill_(1.0) if "norm" in name else tensor.normal_(0, 0.02)
    return Weights(tensors)


def capped(device: Any, cap: int) -> None:
    """This process may take so many bytes of the GPU's memory."""
    import torch

    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        # torch refuses a device without a number here, and here alone
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), device.index or 0)


def commit() -> str | None:
    """This checkout's; where git is not installed, or knows nothing of it, what FRUGAL_RL_COMMIT says."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        found = ""
    return found or os.environ.get("FRUGAL_RL_COMMIT")


def about(device: Any) -> dict[str, Any]:
    """Device, commit and versions."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def number(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = ("frugal-rl", "torch", "transformers", "triton", "peft", "bitsandbytes")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "commit": commit(),
        "versions": {name: number(name) for name in packages},
    }


def synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: Any, work: Callable[[], Any], repeats: int = 5, calls: int = 1) -> float:
    """Seconds of a call: the least of so many turns, each of `calls` in a row, after one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        seconds.append((time.perf_counter() - began) / calls)
    return min(seconds[1:])


# --- runs


def rates(options: argparse.Namespace, device: Any) -> dict[str, Any]:
    import torch

    on_gpu = device.type == "cuda"
    side, width = (8192, 3584) if on_gpu else (256, 512)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    flops = 2 * side**3 / timed(device, lambda: a @ b, calls=5)
    source = torch.ones((1 << 30) if on_gpu else (1 << 22), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / timed(device, lambda: target.copy_(source), calls=5)
    found, kept = passes(device, 18944 if on_gpu else 256, width, "")
    more, kept_more = passes(device, 152064 if on_gpu else 400, width, " head")
    found, kept = found | more, kept | kept_more
    return {
        "bf16_tflops": flops / 1e12,
        "copy_gib_per_s": copy / 2**30,
        "gib_per_s": {name: value / 2**30 for name, value in found.items()},
        "share_of_copy": {name: value / copy for name, value in found.items()},
        "proposed_share": kept,
    }


def passes(device: Any, rows: int, width: int, of: str) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes a second of dequantise and propose on a matrix, and the shares that are proposed, by name."""
    import torch

    from frugal_rl.storage import Overlay, Quantised, bits_of
    from frugal_rl.weights import Transaction, Weights

    entries = rows * width
    code_OI = torch.randint(-127, 128, (rows, width), dtype=torch.int8, device=device)
    low = Quantised(code_OI, torch.full((rows,), 0.035, device=device))
    position_N = torch.arange(0, entries, 251, device=device)  # 0.4 % changed, as the plan has it
    low.overlay = Overlay(position_N, bits_of(torch.randn(len(position_N), device=device).bfloat16()))
    scratch = torch.empty(rows, width, dtype=torch.bfloat16, device=device)
    found = {f"dequantise{of}": 3 * entries / timed(device, lambda: low.copy_to_(scratch), calls=10)}
    weights = Weights({"int8": low, "bf16": scratch.normal_(0, 0.02)}, compute_dtype=torch.bfloat16)
    gradient, kept = torch.randn(rows, width, device=device), {}
    for name, size_of_entry in (("int8", 1), ("bf16", 2)):

        def propose(name: str = name) -> None:
            # so that about 0.2 % change: half a step of a typical weight in bf16 is 4e-5
            transaction = Transaction(weights, 1e-7, None)
            transaction.propose(name, gradient)
            kept[f"{name}{of}"] = sum(len(p) for p, *_ in transaction._proposed[name]) / entries

        found[f"propose {name}{of}"] = (4 + size_of_entry) * entries / timed(device, propose)
    return found, kept


def learner_step(options: argparse.Namespace, device: Any, name: str, form: str) -> dict[str, Any]:
    import numpy as np
    import torch

    from frugal_rl.decoder import Decoder
    from frugal_rl.learn import Learner
    from frugal_rl.rollout import Rollout

    cap, on_gpu, shape = parse_bytes(options.cap), device.type == "cuda", shape_of(name)
    config = make_config(shape)
    prompt = options.tokens // 4
    work = Work(
        sequences=options.sequences,
        prompt_tokens=prompt,
        response_tokens=options.tokens - prompt,
        storage_bytes=2,
        compute_bytes=2 if on_gpu else 4,
        has_host=on_gpu,
        form=form,
        host_room_bytes=host_bytes() * 3 // 4,
    )
    planned = plan(shape, work, to_divide(cap) if on_gpu else cap)
    held = 0 if on_gpu else peak_resident_bytes()
    weights = make_weights(config, form, device)
    decoder = Decoder(config, weights)
    learner = Learner(
        decoder,
        lr=0.1,
        clip=1.0,
        temperature=1.0,
        micro_tokens=planned.micro_tokens,
        boundary_every=planned.boundary_every,
        layers_together=planned.layers_together,
        boundary_on_host=planned.boundary_on_host,
    )
    rng = np.random.default_rng(0)
    nothing = np.zeros(options.tokens - prompt, np.float32)
    rollouts = [
        Rollout(
            tuple(rng.integers(0, shape.vocabulary, prompt).tolist()),
            rng.integers(0, shape.vocabulary, options.tokens - prompt),
            nothing,
            False,
            nothing,
        )
        for _ in range(options.sequences)
    ]
    advantage_B = torch.linspace(-1, 1, options.sequences, device=device)

    def step() -> Any:
        return learner.step(
            rollouts, lambda logprob_BT: (-SCALE * (logprob_BT.mean(1) * advantage_B).mean(), {})
        )

    with clocks(learner, device) as (phase_seconds, phase_peak):
        first = digest(step().commit.changed)
    for tensor in weights.held.values():
        tensor.take_off_()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    done = step()
    synchronize(device)
    seconds = time.perf_counter() - began
    tokens = options.sequences * options.tokens
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else peak_resident_bytes() - held
    return {
        "peak_bytes": peak,
        "reserved_bytes": torch.cuda.max_memory_reserved(device) if on_gpu else None,
        "planned_bytes": planned.learning_bytes,
        "planned": dict(planned.learning),
        "host_planned_bytes": planned.host_bytes,
        "weights_bytes": weights.nbytes,
        "micro_tokens": planned.micro_tokens,
        "boundary_every": planned.boundary_every,
        "layers_together": planned.layers_together,
        "boundary_on_host": planned.boundary_on_host,
        "seconds": seconds,
        "phase_seconds": phase_seconds,
        "phase_peak_bytes": phase_peak if on_gpu else None,
        "tokens_per_s": tokens / seconds,
        "tflops": 8 * shape.parameters * tokens / seconds / 1e12,
        "changed": done.commit.entries / weights.parameters,
        "norm": done.commit.norm,
        "repeats": first == digest(done.commit.changed),
    }


@contextmanager
def clocks(learner: Any, device: Any) -> Iterator[tuple[dict[str, float], dict[str, int]]]:
    """Seconds and peak bytes of each phase of a step; the device is waited for at each turn."""
    import torch

    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}

    def clocked(phase: str, method: Any) -> Any:
        def run(*arguments: Any) -> Any:
            synchronize(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            began = time.perf_counter()
            result = method(*arguments)
            synchronize(device)
            seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - began
            if device.type == "cuda":
                peaks[phase] = max(peaks.get(phase, 0), torch.cuda.max_memory_allocated(device))
            return result

        return run

    began = time.perf_counter()
    for phase in PHASES:
        setattr(learner, phase, clocked(phase.strip("_"), getattr(learner, phase)))
    try:
        yield seconds, peaks
    finally:
        for phase in PHASES:
            delattr(learner, phase)
        seconds["head's gradients, embedding, commit"] = time.perf_counter() - began - sum(seconds.values())


def digest(changed: Mapping[str, Any]) -> str:
    """Of what a step has changed, entry by entry."""
    total = hashlib.blake2b()
    for name, entries in sorted(changed.items()):
        total.update(name.encode())
        for part in (entries.position_N, entries.before_bits_N, entries.after_bits_N):
            total.update(part.cpu().numpy().tobytes())
    return total.hexdigest()


def peer_step(options: argparse.Namespace, device: Any, name: str, kind: str) -> dict[str, Any]:
    """The second step of transformers' model, gradient checkpointing on, a few sequences at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    shape, on_gpu = shape_of(name), device.type == "cuda"
    config = make_config(shape)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.train()
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    if kind == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer: Any = AdamW8bit(trained, lr=1e-6)
    elif kind == "lora":
        optimizer = torch.optim.AdamW(trained, lr=1e-5)
    else:
        optimizer = torch.optim.SGD(trained, lr=0.1)
    token_BT = torch.randint(shape.vocabulary, (options.sequences, options.tokens), device=device)
    advantage_B = torch.linspace(-1, 1, options.sequences, device=device)
    first = options.tokens // 4

    def step() -> None:
        for start in range(0, options.sequences, options.peer_sequences):
            part_BT = token_BT[start : start + options.peer_sequences]
            keep = options.tokens - first + 1
            logit_BTV = model(part_BT, use_cache=False, logits_to_keep=keep).logits[:, :-1]
            loss_BT = torch.nn.functional.cross_entropy(
                logit_BTV.flatten(0, 1), part_BT[:, first:].flatten(), reduction="none"
            ).view(len(part_BT), -1)
            part_B = advantage_B[start : start + options.peer_sequences]
            (SCALE * (loss_BT.mean(1) * part_B).sum() / options.sequences).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    synchronize(device)
    began = time.perf_counter()
    step()
    synchronize(device)
    seconds = time.perf_counter() - began
    tokens = options.sequences * options.tokens
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else peak_resident_bytes(),
        "reserved_bytes": torch.cuda.max_memory_reserved(device) if on_gpu else None,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "tflops": 8 * shape.parameters * tokens / seconds / 1e12,
        "peer_sequences": options.peer_sequences,
    }


def run_one(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    name, _, kind = options.runs.partition(":")
    device = torch.device(options.device)
    capped(device, parse_bytes(options.cap))
    row = {"run": options.runs, "cap": options.cap, **about(device)}
    if name == "rates":
        return {**row, **rates(options, device)}
    row |= {"sequences": options.sequences, "tokens": options.tokens}
    work = learner_step if kind in ("int8", "bf16") else peer_step
    try:
        return {**row, **work(options, device, name, kind)}
    except torch.OutOfMemoryError as error:
        return {**row, "out_of_memory": str(error).split(". ")[0]}


# --- the call


def in_a_process(script: str, options: argparse.Namespace, **changes: Any) -> dict[str, Any] | None:
    """The last line of standard output of this script with these options, read; None if it failed."""
    chosen = {k: v for k, v in {**vars(options), **changes}.items() if k not in ("json", "one")}
    words = [sys.executable, script, "--one", json.dumps(chosen)]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=False)
    return json.loads(done.stdout.decode().splitlines()[-1]) if done.returncode == 0 else None


def keep(path: Path | None, row: Mapping[str, Any]) -> None:
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def said(row: Mapping[str, Any], tflops: float | None) -> str:
    if "out_of_memory" in row:
        return f"does not fit: {row['out_of_memory']}"
    if "bf16_tflops" in row:
        parts = [
            f"{name} {row['gib_per_s'][name]:.0f} GiB/s ({share:.0%})"
            for name, share in row["share_of_copy"].items()
        ]
        return f"{row['bf16_tflops']:.1f} TFLOP/s, copy {row['copy_gib_per_s']:.0f} GiB/s; " + ", ".join(
            parts
        )
    share = f" ({row['tflops'] / tflops:.0%} of the rate)" if tflops else ""
    text = (
        f"{row['sequences']} x {row['tokens']} tokens: {row['seconds']:.1f} s, {row['tokens_per_s']:.0f} "
        f"tokens/s, {row['tflops']:.1f} TFLOP/s{share}; peak {size(row['peak_bytes'])}"
    )
    if "planned_bytes" in row:
        where = " on the host" if row["boundary_on_host"] else ""
        text += (
            f", planned {size(row['planned_bytes'])}; micro-batches of {row['micro_tokens']} tokens, every "
            f"{row['boundary_every']} boundaries{where}; {row['changed']:.2%} changed; two runs "
            + ("agree" if row["repeats"] else "DIFFER")
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", default="rates,Qwen2.5-7B:int8,Qwen2.5-7B:bf16,Qwen2.5-14B:int8")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=1024, help="of a sequence, prompt included")
    parser.add_argument("--peer-sequences", type=int, default=2, help="that a peer takes at a time")
    parser.add_argument("--cap", default="24GiB")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="append a line a run to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the command line does
    if options.one:
        print(json.dumps(run_one(argparse.Namespace(**json.loads(options.one)))))
        return
    tflops = None
    for run in options.runs.split(","):
        row = in_a_process(__file__, options, runs=run)
        if row is None:
            print(f"{run:<22} failed", flush=True)
            continue
        tflops = row.get("bf16_tflops", tflops)
        if tflops and "tflops" in row:
            row["share_of_rate"] = row["tflops"] / tflops
        print(f"{run:<22} {said(row, tflops)}", flush=True)
        keep(options.json, row)


if __name__ == "__main__":
    main()
