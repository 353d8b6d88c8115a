"""One learner step of a 7B or 14B shape on a GPU under a 24 GiB cap: peak, seconds, and what was planned.

    python tools/bench_cap.py [--runs Qwen2.5-7B:int8,Qwen2.5-7B:bf16,Qwen2.5-14B:int8] [--cap 24GiB] ...

Random weights of the real shape are made on the device, tensor by tensor (int8: random codes and one
scale), so nothing is downloaded. 128 sequences of 1024 tokens, the first quarter of each the prompt, are
learned in one step with the plan's own choices; each run is a process of its own, capped with
torch.cuda.set_per_process_memory_fraction. `--device cpu` tries the script itself on a small shape.

Expected: 7B int8 under 12 GiB, 7B bf16 and 14B int8 under 20 GiB. Not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from frugal_rl.config import parse_bytes
from frugal_rl.console import size
from frugal_rl.memory import Shape, Work, host_bytes, peak_resident_bytes, plan
from frugal_rl.shapes import find_shape

SCALE = 0.02  # of the loss: the norm is then below the clip, as in training


def make_config(shape: Shape) -> Any:
    """A Qwen2 config of that shape."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
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
    assert shape.head_size * shape.heads == shape.hidden
    return config


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


def step(options: argparse.Namespace, name: str, form: str) -> dict[str, Any]:
    import numpy as np
    import torch

    from frugal_rl.decoder import Decoder
    from frugal_rl.learn import Learner
    from frugal_rl.rollout import Rollout

    device, cap = torch.device(options.device), parse_bytes(options.cap)
    on_gpu = device.type == "cuda"
    if on_gpu:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), device)
    shape, _ = find_shape(name)
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
    planned = plan(shape, work, cap)
    held = 0 if on_gpu else peak_resident_bytes()
    weights = make_weights(config, form, device)
    learner = Learner(
        Decoder(config, weights),
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
    began = time.perf_counter()
    done = learner.step(rollouts, lambda logprob_BT: (-SCALE * (logprob_BT.mean(1) * advantage_B).mean(), {}))
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    tokens = options.sequences * options.tokens
    return {
        "model": name,
        "form": form,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "torch": torch.__version__,
        "sequences": options.sequences,
        "tokens": options.tokens,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else peak_resident_bytes() - held,
        "reserved_bytes": torch.cuda.max_memory_reserved(device) if on_gpu else None,
        "planned_bytes": planned.learning_bytes,
        "host_planned_bytes": planned.host_bytes,
        "micro_tokens": planned.micro_tokens,
        "boundary_every": planned.boundary_every,
        "boundary_on_host": planned.boundary_on_host,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "tflops": 8 * shape.parameters * tokens / seconds / 1e12,
        "changed": done.commit.entries / weights.parameters,
        "norm": done.commit.norm,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", default="Qwen2.5-7B:int8,Qwen2.5-7B:bf16,Qwen2.5-14B:int8")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--cap", default="24GiB")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="append a line a run to this file")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(step(options, *options.runs.split(":"))))
        return
    for run in options.runs.split(","):
        words = [sys.executable, __file__, "--one", "--runs", run, "--cap", options.cap]
        words += ["--sequences", str(options.sequences), "--tokens", str(options.tokens)]
        done = subprocess.run([*words, "--device", options.device], stdout=subprocess.PIPE, check=False)
        if done.returncode:
            print(f"{run:<18} failed", flush=True)
            continue
        line = done.stdout.decode().splitlines()[-1]
        row = json.loads(line)
        print(
            f"{run:<18} {row['sequences']} x {row['tokens']} tokens: peak {size(row['peak_bytes'])}, planned "
            f"{size(row['planned_bytes'])}; {row['seconds']:.1f} s, {row['tokens_per_s']:.0f} tokens/s, "
            f"{row['tflops']:.1f} TFLOP/s; micro-batches of {row['micro_tokens']} tokens, every "
            f"{row['boundary_every']} boundaries{' on the host' if row['boundary_on_host'] else ''}, "
            f"{row['changed']:.2%} changed",
            flush=True,
        )
        if options.json:
            with open(options.json, "a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
