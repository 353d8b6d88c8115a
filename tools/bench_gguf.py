"""llama.cpp as a generator: the time to follow a step, beside reloading; tokens/s beside the engine.

    python tools/bench_gguf.py sync     # a random Qwen2.5-0.5B shape, q8_0, 0.02 % of its entries changed
    python tools/bench_gguf.py tiny     # the embedded model: tokens/s of both, batch 1, 16, 64
    python tools/bench_gguf.py shape    # the 0.5B shape: int8 (engine) and q8_0 (llama.cpp)
    python tools/bench_gguf.py logits   # 50 steps of training, then logits beside torch's, 100 prompts

Each prints one JSON object a line. --threads: of torch and llama.cpp [2].
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from frugal_rl.config import load_recipe
from frugal_rl.decoder import Decoder
from frugal_rl.generate.engine import Engine
from frugal_rl.generate.llama_library import Library, LlamaModel
from frugal_rl.generate.llamacpp import LlamaEngine, Twin
from frugal_rl.gguf.write import write_gguf
from frugal_rl.memory import peak_resident_bytes, return_large_blocks
from frugal_rl.models import find_model, load_tokenizer
from frugal_rl.policy import load_policy
from frugal_rl.problems import load_problems
from frugal_rl.rollout import Request
from frugal_rl.storage import Changed, Quantised
from frugal_rl.weights import Weights

SHARE = 0.0002
BATCHES = (1, 16, 64)
ROUNDED = {"bf16": torch.bfloat16, "f16": torch.float16}


def qwen_config() -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        "qwen2",
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )


def random_weights(config: Any, *, quantise: bool) -> Weights:
    """bf16 numbers of the usual size, a million Gaussian ones again and again; matrices in int8 if asked."""
    from frugal_rl.decoder import build_skeleton

    torch.manual_seed(0)
    some = torch.empty(1_000_003).normal_(std=0.02).bfloat16()
    tensors: dict[str, Any] = {}
    for name, parameter in build_skeleton(config).named_parameters():
        if name == "lm_head.weight":
            continue
        times = -(-parameter.numel() // len(some))
        value = some.repeat(times)[: parameter.numel()].view(parameter.shape).clone()
        if name.endswith("norm.weight"):
            value.fill_(1.0)
        tensors[name] = Quantised.of(value) if quantise and value.ndim == 2 else value
    return Weights(tensors)


def random_change(weights: Weights, seed: int) -> dict[str, Changed]:
    """SHARE of the entries of every tensor, one unit in the last place up."""
    generator, changed = torch.Generator().manual_seed(seed), {}
    for name, held in weights.held.items():
        entries = int(np.prod(held.shape))
        count = max(1, round(SHARE * entries))
        position_N = torch.randint(entries, (count,), generator=generator).unique()
        before_N = held.at(position_N).view(torch.int16)
        changed[name] = Changed(position_N, before_N, before_N + 1)
    return changed


def timed(work: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    out = work()
    return time.perf_counter() - began, out


def sync(threads: int) -> None:
    config = qwen_config()
    weights = random_weights(config, quantise=False)
    twin = Twin(weights, config.to_dict(), "q8_0")
    library, row = twin.model.library, {}
    times = []
    for seed in range(5):
        changed = random_change(weights, seed)
        weights.write_(changed)
        seconds, blocks = timed(twin.sync_)
        times.append(seconds)
        row |= {"entries": sum(len(c.position_N) for c in changed.values()), "blocks": blocks}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.gguf"
        values = {n: twin_values(weights, n) for n in weights.held}
        write_s, _ = timed(lambda: write_gguf(path, config.to_dict(), values, "q8_0", name="policy"))
        loads = []
        for _ in range(3):
            load_s, model = timed(lambda: LlamaModel(library, path, threads=threads, on_gpu=False))
            model.close()
            loads.append(load_s)
    best, load = min(times), min(loads)
    print(
        json.dumps(
            {
                "what": "sync",
                **row,
                "sync_s": [round(t, 4) for t in times],
                "load_s": [round(t, 4) for t in loads],
                "write_s": round(write_s, 3),
                "sync_of_load": round(best / load, 4),
                "sync_of_write_and_load": round(best / (load + write_s), 5),
            }
        ),
        flush=True,
    )


def twin_values(weights: Weights, name: str) -> Any:
    from frugal_rl.generate.llamacpp import _values

    return _values(weights, name)


def throughput(name: str, engines: dict[str, Any], prompts: list[tuple[int, ...]], tokens: int) -> None:
    for batch in BATCHES:
        requests = [Request(prompts[i % len(prompts)], (0, i)) for i in range(batch)]
        row: dict[str, Any] = {"what": name, "batch": batch}
        for label, engine in engines.items():
            seconds, rollouts = timed(
                lambda e=engine, r=requests: dict(e.generate(r, max_tokens=tokens, temperature=1.0))
            )
            count = sum(len(r.response_ids) for r in rollouts.values())
            row[label] = round(count / seconds, 1)
        print(json.dumps({**row, "peak_bytes": peak_resident_bytes()}), flush=True)


def tiny() -> None:
    recipe = load_recipe("tiny")
    files = find_model("tiny")
    tokenizer = load_tokenizer(files)
    problems = load_problems(recipe.data, tokenizer, recipe.data.max_prompt_tokens)
    policy = load_policy(files, tokenizer, torch.device("cpu"))
    prompts = [p.prompt_ids for p in problems.train[:256]]
    engines = {
        "engine bf16": Engine(policy.decoder, 64, frozenset(), 1024),
        "llama.cpp q8_0": LlamaEngine(
            policy.decoder, Twin(policy.weights, files.config, "q8_0"), 64, frozenset()
        ),
    }
    for engine in engines.values():
        dict(engine.generate([Request(prompts[0], (0,))], max_tokens=8, temperature=1.0))
    throughput("tiny", engines, prompts, 64)


def shape() -> None:
    config = qwen_config()
    weights = random_weights(config, quantise=True)
    decoder = Decoder(config, weights)
    twin = Twin(weights, config.to_dict(), "q8_0")
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, 151000, 32).tolist()) for _ in range(64)]
    throughput("shape", {"llama.cpp q8_0": LlamaEngine(decoder, twin, 64, frozenset())}, prompts, 16)
    throughput("shape", {"engine int8": Engine(decoder, 64, frozenset(), 1024)}, prompts, 4)


def logits(threads: int) -> None:
    """Logits beside torch's in float32, and whether every tensor is a fresh conversion's.

    ggml rounds what enters a product to the weights' format (bf16, f16): beside torch with the same
    rounding too, and the gap between torch with and without it.
    """
    from frugal_rl.journal import Journal
    from frugal_rl.session import Reporter, open_session
    from frugal_rl.train import train

    prompts = [p.prompt_ids for p in load_tiny_problems()[:100]]
    for form in ("bf16", "f16", "q8_0"):
        recipe = load_recipe(
            "tiny",
            ["rollout.generator=llama.cpp", f"rollout.gguf={form}", "train.steps=50", "data.heldout=100"],
        )
        report = Reporter(lambda text: None, lambda row: None)
        with tempfile.TemporaryDirectory() as folder, open_session(recipe, report) as session:
            train(session, Journal.create(Path(folder) / "run", recipe, force=False), report, lambda: False)
            twin = session.engine.sampler.twin  # type: ignore[attr-defined]
            twin.sync_()
            fresh = Twin(session.policy.weights, session.files.config, form)
            same = all(np.array_equal(blocks, fresh.tensors()[n]) for n, blocks in twin.tensors().items())
            gaps, rounded_gaps, own_gaps, largest = [], [], [], 0.0
            model = torch_model(session.policy.decoder)
            for ids in prompts:
                ours = twin_logits(twin, ids)
                theirs = torch_logits(model, ids)
                largest = max(largest, float(np.abs(theirs).max()))
                gaps.append(float(np.abs(ours - theirs).max()))
                if form in ROUNDED:
                    with inputs_rounded(model, ROUNDED[form]):
                        rounded = torch_logits(model, ids)
                    rounded_gaps.append(float(np.abs(ours - rounded).max()))
                    own_gaps.append(float(np.abs(theirs - rounded).max()))
        print(
            json.dumps(
                {
                    "what": "logits",
                    "format": form,
                    "prompts": len(prompts),
                    "max_gap": round(max(gaps), 4),
                    "median_gap": round(float(np.median(gaps)), 4),
                    "max_gap_to_torch_rounding_alike": round(max(rounded_gaps), 4) if rounded_gaps else None,
                    "max_gap_of_torch_to_itself_rounding": round(max(own_gaps), 4) if own_gaps else None,
                    "largest_logit": round(largest, 1),
                    "tensors_are_a_fresh_conversions": same,
                }
            ),
            flush=True,
        )


def load_tiny_problems() -> Any:
    recipe = load_recipe("tiny")
    return load_problems(recipe.data, load_tokenizer(find_model("tiny")), 512).train


def twin_logits(twin: Twin, ids: tuple[int, ...]) -> np.ndarray:
    count = len(ids)
    with twin.model.context(sequences=1, cells=count, batch_tokens=count) as context:
        rows = []
        for place, token in enumerate(ids):
            one = [np.asarray([x]) for x in (token, place, 0)]
            rows.append(context.decode(*one, np.ones(1, bool)).copy())
    return np.concatenate(rows)


def torch_model(decoder: Decoder) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(decoder.config).float().eval()
    state = {n: t.float() for n, t in decoder.weights.tensors.items()}
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model


@torch.no_grad()
def torch_logits(model: Any, ids: tuple[int, ...]) -> np.ndarray:
    return np.asarray(model(torch.tensor([ids])).logits[0].numpy())


@contextmanager
def inputs_rounded(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """What enters a product with a weight is rounded to `dtype` first."""
    hooks = [
        m.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype).float(),))
        for m in model.modules()
        if isinstance(m, torch.nn.Linear)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["sync", "tiny", "shape", "logits"])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    return_large_blocks()
    torch.set_num_threads(arguments.threads)
    Library.load()
    work = {"sync": sync, "logits": logits}
    if arguments.what in work:
        work[arguments.what](arguments.threads)
    else:
        {"tiny": tiny, "shape": shape}[arguments.what]()


if __name__ == "__main__":
    main()
