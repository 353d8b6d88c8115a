"""Memory of generating, by length of the responses: the KV pool must not grow with it.

    python tools/bench_pool.py [--methods rkv,snapkv,h2o,streaming,none] [--lengths 256,1024,4096]

A random Qwen3 of 4 layers with the KV heads of Qwen2.5-0.5B (2 of 64) and a small vocabulary answers with
--slots sequences of a fixed length; each run is a process of its own. `pool`: bytes of keys and values,
beside slots x layers x KV heads x (budget + buffer) x 2 x head size x 4 (float32 on a CPU; with --methods
none the prompt and the response instead of budget and buffer). `grown`: what the process's peak resident
memory grew by from the loaded model to the end, activations and eviction's temporaries with it.

Measured with --slots 8 on one core of an AMD EPYC, torch 2.13 (the pool is the formula's):

    responses of       256 tokens     1024        4096
    pool               20.0 MiB       20.0        20.0     none: 10.0, 34.0, 130.0
    grown  rkv         42.2 MiB       64.0        67.8     (its similarities of keys, first needed at 640)
           snapkv      37.7 MiB       42.5        41.8
           h2o         45.6 MiB       41.7        43.2
           streaming   39.4 MiB       41.5        45.4
           none        30.5 MiB       51.1       150.7
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from frugal_rl.console import size
from frugal_rl.memory import peak_resident_bytes, return_large_blocks

LAYERS, KV_HEADS, HEAD_SIZE, VOCABULARY, PROMPT = 4, 2, 64, 512, 64
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 14,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_SIZE,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Options:
    method: str
    length: int
    slots: int
    budget: int
    buffer: int


def pool_bytes(options: Options) -> int:
    """By the formula."""
    compressed = options.method != "none"
    entries = options.budget + options.buffer if compressed else PROMPT + options.length
    return options.slots * LAYERS * KV_HEADS * entries * 2 * HEAD_SIZE * 4


def generate(options: Options) -> dict[str, Any]:
    import numpy as np
    import torch
    from transformers import AutoConfig

    from frugal_rl.decoder import Decoder, build_skeleton
    from frugal_rl.generate.engine import Engine
    from frugal_rl.generate.eviction import Eviction
    from frugal_rl.rollout import Request
    from frugal_rl.weights import Weights

    return_large_blocks()
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", **SHAPE)
    skeleton = build_skeleton(config)
    tensors = {name: torch.randn(p.shape) * 0.05 for name, p in skeleton.named_parameters()}
    decoder = Decoder(config, Weights(tensors))
    compressed = options.method != "none"
    eviction = Eviction(options.method, options.budget, options.buffer) if compressed else None  # type: ignore[arg-type]
    engine = Engine(decoder, options.slots, frozenset(), 1024, eviction=eviction)
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, VOCABULARY, PROMPT).tolist()) for _ in range(options.slots)]
    requests = [Request(prompt, (0, i)) for i, prompt in enumerate(prompts)]
    before, began = peak_resident_bytes(), time.perf_counter()
    tokens = sum(
        len(r.response_ids) for _, r in engine.generate(requests, max_tokens=options.length, temperature=1.0)
    )
    assert tokens == options.slots * options.length
    return {
        "pool": engine.stats.cache_bytes,
        "remembered": engine.stats.memory_bytes,
        "evictions": engine.stats.evictions,
        "grown": peak_resident_bytes() - before,
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--methods", default="rkv,snapkv,h2o,streaming,none")
    parser.add_argument("--lengths", default="256,1024,4096")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--buffer", type=int, default=128)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(generate(Options(**json.loads(given.one)))))
        return
    for method in given.methods.split(","):
        for length in map(int, given.lengths.split(",")):
            options = Options(method, length, given.slots, given.budget, given.buffer)
            words = [sys.executable, __file__, "--one", json.dumps(vars(options))]
            done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{method:<10}{length:>6} tokens: pool {size(row['pool'])} (formula "
                f"{size(pool_bytes(options))}), remembered {size(row['remembered'])}, grown "
                f"{size(row['grown'])}, {row['evictions']} evictions, {row['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
