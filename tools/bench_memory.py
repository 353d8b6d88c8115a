"""Peak memory and seconds of one learner step at a real size on a CPU, beside plain training steps.

    python tools/bench_memory.py [--arms learner,sgd,adamw] [--sequences 16] [--tokens 512]

A randomly initialised Qwen2.5-0.5B shape (494 M parameters, vocabulary 151,936, tied) in bf16, on sequences
of which the first quarter is the prompt, with a policy-gradient loss. Each arm is a process of its own.

    learner   one step of frugal_rl.learn.Learner (bf16 weights, float32 arithmetic)
    sgd       transformers in bf16, gradient checkpointing, the whole batch at once, torch.optim.SGD
    adamw     the same with torch.optim.AdamW

`over`: peak resident memory over that of the process once torch and transformers' model class are imported.
For the plain arms `--plain-sequences` may be smaller: bf16 products are slow on a CPU without bf16 units.

Measured on 2 cores of an AMD EPYC without bf16 units, torch 2.13, OMP_NUM_THREADS=1, a busy machine (seconds
vary by a factor of two); 338 MiB are the libraries. 2 % of the entries changed, many more than in a trained
model: the weights are random. The plan counts 0.4 %.

    --arms learner                 over      planned   seconds
    --sequences 2 --tokens 64      1.4 GiB   1.3 GiB   34
    --sequences 6 --tokens 512     1.6 GiB   1.8 GiB   207
    --sequences 16 --tokens 512    not measured since freed blocks go back to the system; 2.8 GiB before

The plain arms: not measured yet (2 x 64 tokens did not end within 100 s on that machine).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from frugal_rl.console import size
from frugal_rl.memory import Plan, Shape, Work, peak_resident_bytes, plan, return_large_blocks

QWEN_05B = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
}
LR, CLIP = 0.1, 1.0


def make_plan(sequences: int, tokens: int) -> Plan:
    """The plan that `train` would make on a CPU."""
    work = Work(
        sequences=sequences,
        prompt_tokens=tokens // 4,
        response_tokens=tokens - tokens // 4,
        storage_bytes=2,
        compute_bytes=4,
        has_host=False,
    )
    return plan(Shape.from_config(QWEN_05B), work, 64 << 30)


def learner_step(sequences: int, tokens: int) -> tuple[int, float]:
    """Bytes held before the weights are made, and seconds of the step."""
    import numpy as np
    import torch

    from frugal_rl.decoder import Decoder, parameter_names
    from frugal_rl.learn import Learner
    from frugal_rl.rollout import Rollout
    from frugal_rl.weights import Weights

    return_large_blocks()  # as `train` does on a CPU
    config = _config()
    names = sorted(parameter_names(config))
    shapes = {n: p.shape for n, p in _skeleton(config).named_parameters()}
    baseline = peak_resident_bytes()
    tensors = {}
    for name in names:  # as a checkpoint would be loaded: the final size and one tensor
        tensor = torch.empty(shapes[name], dtype=torch.bfloat16)
        tensors[name] = tensor.fill_(1.0) if "norm" in name else tensor.normal_(0, 0.02)
    decoder = Decoder(config, Weights(tensors))
    rng = np.random.default_rng(0)
    prompt = tokens // 4
    rollouts = [
        Rollout(
            tuple(rng.integers(0, config.vocab_size, prompt).tolist()),
            rng.integers(0, config.vocab_size, tokens - prompt),
            np.zeros(tokens - prompt, np.float32),
            False,
            np.zeros(tokens - prompt, np.float32),
        )
        for _ in range(sequences)
    ]
    advantage_B = torch.linspace(-1, 1, sequences)
    micro_tokens = make_plan(sequences, tokens).micro_tokens
    learner = Learner(decoder, LR, CLIP, 1.0, micro_tokens)
    began = time.perf_counter()
    step = learner.step(rollouts, lambda logprob_BT: (-(logprob_BT.mean(1) * advantage_B).mean(), {}))
    seconds = time.perf_counter() - began
    print(f"  norm {step.commit.norm:.3g}, {step.commit.entries:,} entries changed", file=sys.stderr)
    return baseline, seconds


def plain_step(kind: str, sequences: int, tokens: int) -> tuple[int, float]:
    """Transformers' own model and loop."""
    import torch
    from transformers import AutoModelForCausalLM

    config = _config()
    baseline = peak_resident_bytes()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.train()
    model.gradient_checkpointing_enable()
    token_BT = torch.randint(config.vocab_size, (sequences, tokens))
    advantage_B = torch.linspace(-1, 1, sequences)
    first = tokens // 4
    make: Callable[..., Any] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
    optimiser = make(model.parameters(), lr=LR if kind == "sgd" else 1e-6)
    began = time.perf_counter()
    logit_BTV = model(token_BT, use_cache=False, logits_to_keep=tokens - first + 1).logits[:, :-1]
    loss_BT = torch.nn.functional.cross_entropy(
        logit_BTV.flatten(0, 1), token_BT[:, first:].flatten(), reduction="none"
    ).view(sequences, -1)
    (loss_BT.mean(1) * advantage_B).mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimiser.step()
    return baseline, time.perf_counter() - began


def _config() -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model("qwen2", **QWEN_05B)


def _skeleton(config: Any) -> Any:
    from frugal_rl.decoder import build_skeleton

    return build_skeleton(config)


def run_arm(arm: str, sequences: int, tokens: int) -> None:
    """In a process of its own: one JSON line."""
    if arm == "learner":
        baseline, seconds = learner_step(sequences, tokens)
    else:
        baseline, seconds = plain_step(arm, sequences, tokens)
    peak = peak_resident_bytes()
    row = {"arm": arm, "sequences": sequences, "baseline_bytes": baseline, "peak_bytes": peak}
    print(json.dumps({**row, "over_bytes": peak - baseline, "seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arms", default="learner,sgd,adamw")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--plain-sequences", type=int, help="of the plain arms [as --sequences]")
    parser.add_argument("--tokens", type=int, default=512, help="of a sequence, prompt included")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_arm(options.one, options.sequences, options.tokens)
        return
    rows = {}
    for arm in options.arms.split(","):
        plain = arm != "learner" and options.plain_sequences
        sequences = options.plain_sequences if plain else options.sequences
        words = ["--one", arm, "--sequences", str(sequences), "--tokens", str(options.tokens)]
        done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, check=True)
        row = rows[arm] = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{arm:<8} {sequences} x {options.tokens} tokens: {size(row['over_bytes'])} over "
            f"{size(row['baseline_bytes'])}, {row['seconds']:.0f} s",
            flush=True,
        )
    planned = make_plan(options.sequences, options.tokens)
    print(f"planned  {size(planned.learning_bytes)}, micro-batches of {planned.micro_tokens} tokens")
    if "learner" in rows:
        mine = rows["learner"]
        print(f"learner / planned: {mine['over_bytes'] / planned.learning_bytes:.2f} of the memory")
        for arm, row in rows.items():
            if arm != "learner":
                per_token = mine["seconds"] / mine["sequences"] * row["sequences"] / row["seconds"]
                note = "" if row["sequences"] == mine["sequences"] else f" (of {row['sequences']} sequences)"
                print(
                    f"learner / {arm}: {mine['over_bytes'] / row['over_bytes']:.2f} of the memory{note}, "
                    f"{per_token:.2f} of the seconds a token"
                )


if __name__ == "__main__":
    main()
