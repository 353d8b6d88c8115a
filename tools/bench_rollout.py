"""Rollouts a second of the engine, beside transformers' generate and its continuous batching, in one process.

    python tools/bench_rollout.py [--problems 32] [--samples 8] [--slots 32] [--repeats 3]

The embedded model in float32 samples at temperature 1 from the same prompts (ragged, about 12 to 18 tokens),
until its end-of-sequence token or --max-tokens. `generate` gets batches of --slots left-padded prompts, so
that its cache has the engine's bytes; `continuous` is transformers' generate_batch, as many at once.
Arms take turns, --repeats times; medians are compared. The three draw their own random numbers, so lengths
differ a little: the measure is response tokens a second. `bound`: tokens a second if only the weights had to
be read, once a token position of --slots sequences, at the copy bandwidth measured here.

Measured on 2 idle cores of an AMD EPYC, torch 2.13, transformers 5.23, default options, median (range):

    engine      5432 tokens/s (5266 to 5759)
    generate    1987 (1843 to 2269)     engine / generate 2.73; 3.13 on one busy core, 2.98 on another day
    continuous  2010 (1929 to 2091)     engine / continuous 2.70; 2.94; 2.95
    bound       160,000: the model is 3 MiB, so the calls cost, not the bytes
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_decode import paged

from frugal_rl.config import load_recipe
from frugal_rl.generate.engine import Engine
from frugal_rl.models import find_model, load_tokenizer
from frugal_rl.policy import load_policy
from frugal_rl.problems import load_problems
from frugal_rl.rollout import Request


def copy_bandwidth() -> float:
    """Bytes a second, read and written."""
    source, target = torch.ones(1 << 26), torch.empty(1 << 26)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - began)
    return 2 * source.nbytes / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--problems", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arms", default="engine,generate,continuous")
    options = parser.parse_args()
    recipe = load_recipe("tiny")
    files = find_model("tiny")
    tokenizer = load_tokenizer(files)
    problems = load_problems(recipe.data, tokenizer, recipe.data.max_prompt_tokens)
    prompts = [p.prompt_ids for p in problems.train[: options.problems] for _ in range(options.samples)]
    made = {"engine": engine_arm, "generate": generate_arm, "continuous": continuous_arm}
    arms = {name: made[name](files, tokenizer, prompts, options) for name in options.arms.split(",")}
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(options.repeats + 1):
        for name, arm in arms.items():
            began = time.perf_counter()
            tokens = arm(repeat)
            seconds = time.perf_counter() - began
            if repeat:  # the first is a warm-up
                rates[name].append(tokens / seconds)
            print(f"  {name}: {tokens} tokens in {seconds:.2f} s", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        ratio = f", engine / {name} {medians['engine'] / rate:.2f}" if "engine" in medians else ""
        print(
            f"{name:<11}{rate:8.0f} tokens/s (of {options.repeats}, {min(rates[name]):.0f} to "
            f"{max(rates[name]):.0f}){ratio}"
        )
    weights = sum(p.numel() for p in reference_model(files).parameters()) * 4
    bound = copy_bandwidth() / 2 / weights * options.slots
    print(
        f"bound      {bound:8.0f} tokens/s: {weights / 2**20:.1f} MiB of weights a token of {options.slots}"
    )


def engine_arm(files: Any, tokenizer: Any, prompts: list[Any], options: Any) -> Callable[[int], int]:
    policy = load_policy(files, tokenizer, torch.device("cpu"))
    engine = Engine(policy.decoder, options.slots, policy.stop_ids, 1024)

    def run(repeat: int) -> int:
        requests = [Request(p, (repeat, i)) for i, p in enumerate(prompts)]
        done = engine.generate(requests, max_tokens=options.max_tokens, temperature=1.0)
        return sum(len(rollout.response_ids) for _, rollout in done)

    return run


def reference_model(files: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32).eval()


def generate_arm(files: Any, tokenizer: Any, prompts: list[Any], options: Any) -> Callable[[int], int]:
    model = reference_model(files)
    eos = (
        {int(i) for i in model.generation_config.eos_token_id or []}
        if isinstance(model.generation_config.eos_token_id, list)
        else {int(model.generation_config.eos_token_id)}
    )
    pad = min(eos)

    def run(repeat: int) -> int:
        torch.manual_seed(repeat)
        total = 0
        for start in range(0, len(prompts), options.slots):
            batch = prompts[start : start + options.slots]
            width = max(map(len, batch))
            ids_BT = torch.full((len(batch), width), pad)
            mask_BT = torch.zeros_like(ids_BT)
            for row, prompt in enumerate(batch):
                ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
                mask_BT[row, width - len(prompt) :] = 1
            out = model.generate(
                ids_BT,
                attention_mask=mask_BT,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=options.max_tokens,
                pad_token_id=pad,
            )
            for row in out[:, width:].tolist():
                ends = [i for i, token in enumerate(row) if token in eos]
                total += ends[0] + 1 if ends else len(row)
        return total

    return run


def continuous_arm(files: Any, tokenizer: Any, prompts: list[Any], options: Any) -> Callable[[int], int]:
    from transformers import GenerationConfig

    model = reference_model(files)
    config = GenerationConfig(
        max_new_tokens=options.max_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=0,
    )
    batching = paged(
        128,  # holds any prompt and response
        num_blocks=options.slots,
        max_requests_per_batch=options.slots,
        max_batch_tokens=max(256, options.slots),
    )

    def run(repeat: int) -> int:
        torch.manual_seed(repeat)
        done = model.generate_batch(
            inputs=[list(p) for p in prompts],
            generation_config=config,
            continuous_batching_config=batching,
            progress_bar=False,
        )
        return sum(len(output.generated_tokens) for output in done.values())

    return run


if __name__ == "__main__":
    main()
