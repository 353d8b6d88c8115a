"""Decoding on a GPU: milliseconds a step and how near they come to the memory bandwidth, beside transformers.

    python tools/bench_decode.py [--models Qwen2.5-7B] [--forms bf16,int8] [--slots 64] [--entries 640] ...
    python tools/bench_decode.py --models '' --tests       # python -m pytest -m gpu, and nothing else
    python tools/bench_decode.py --models '' --schedule --device cpu    # how busy slots are: a count

Limit: a step reads the weights and the live KV entries once. `bound` is those bytes at the copy bandwidth
(bytes read and written a second) that is measured here first; `ratio` is bound / measured. Weights: all but
the rows of an untied embedding that are not looked up; the patch is not counted, so its cost shows.

Random weights of the real shape are made on the device, as in bench_learn.py, and nothing is downloaded; each
model and form is a process of its own under the cap. One prompt is run and copied to all slots, then the
engine's own loop decodes (step, and look at what has ended); medians of --steps steps, the last of which sees
--entries entries. Every combination of --slots, --entries, --graphs (on, off: FRUGAL_RL_GRAPHS), --kernels
(auto, plain: FRUGAL_RL_KERNELS) and --patch (share of changed entries, int8 only: in bf16 they lie in the
matrices themselves) that fits is measured until --seconds are over; what was left out is said.

Peers (bf16, at --peer-slots, the first of --entries, same weights in the same process): transformers'
`generate` with a static cache, which it compiles on a GPU, medians of the same steps; and its continuous
batching, medians of the steps in which all requests are decoding. `--profile N`: the N kernels that
take longest, of the --peer-slots rows. One call takes ten minutes at most, and all combinations take more:
choose with --models. `--device cpu --models tiny --slots 1,4 --entries 60 --peer-slots 4 --steps 8` tries it.

Expected on a 24 GB card, 7B, 64 slots, 640 entries: ratio of at least 0.6 in int8 and 0.75 in bf16, int8 at
least 1.5 times as fast as bf16, 5 times generate, a patch of 0.2 % under 8 %. Not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from bench_learn import capped, make_config, make_weights

from frugal_rl.config import parse_bytes
from frugal_rl.console import size
from frugal_rl.shapes import find_shape

PREFILL_TOKENS = 2048
WARM_STEPS = 8  # before the first that is timed: a capture, and clocks
PROFILED_STEPS = 5


def copy_bandwidth(device: Any, nbytes: int) -> float:
    """Bytes read and written a second, median of 20 copies."""
    import torch

    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    times = timed(device, [lambda: target.copy_(source)] * 23)[3:]
    return 2 * nbytes / statistics.median(times)


def timed(device: Any, calls: list[Callable[[], object]]) -> list[float]:
    """Seconds of each call, from the end of the one before; on a GPU by events, so that nothing waits."""
    import torch

    if device.type != "cuda":
        marks: list[Any] = [time.perf_counter()]
        for call in calls:
            call()
            marks.append(time.perf_counter())
        return [b - a for a, b in pairwise(marks)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    marks[0].record()
    for call, mark in zip(calls, marks[1:], strict=True):
        call()
        mark.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def bytes_to_move(decoder: Any, slots: int, entries: float) -> tuple[int, int]:
    """Of the weights, and of the live entries of the cache, in a step."""
    weights, config = decoder.weights, decoder.config
    matrices = sum(
        held.nbytes - (held.overlay.nbytes if hasattr(held, "code_OI") else 0)
        for name, held in weights.held.items()
        if name != decoder.embed_name or decoder.tied
    )
    head_size = config.hidden_size // config.num_attention_heads
    entry = 2 * len(decoder.layers) * config.num_key_value_heads * head_size * decoder.dtype.itemsize
    return matrices, int(slots * entries * entry)


def lay_patch_(weights: Any, share: float) -> None:
    """Change that share of the entries of each int8 matrix, at random."""
    import torch

    from frugal_rl.storage import Changed, Quantised, bits_of

    changed = {}
    for name, held in weights.held.items():
        if isinstance(held, Quantised):
            entries = held.code_OI.numel()
            drawn_N = torch.randint(0, entries, (int(entries * share),), device=weights.device)
            position_N = torch.unique(drawn_N)
            before_N = held.at(position_N)
            changed[name] = Changed(position_N, bits_of(before_N), bits_of(before_N * 1.125))
    weights.write_(changed)


def decode(decoder: Any, slots: int, entries: int, options: Any, *, graphs: bool, profile: bool) -> Any:
    """A row of the engine: one prompt in all slots, then decode steps."""
    import torch

    from frugal_rl.generate.engine import Engine, _Run
    from frugal_rl.generate.graphs import recorder_for
    from frugal_rl.generate.sample import Truncation
    from frugal_rl.rollout import Request

    device = decoder.device
    profiled = PROFILED_STEPS if profile else 0
    steps = WARM_STEPS + options.steps + profiled
    prompt = tuple(torch.randint(0, decoder.config.vocab_size, (max(1, entries - steps),)).tolist())
    engine = Engine(
        decoder, slots, frozenset(), PREFILL_TOKENS, recorder=recorder_for if graphs else lambda _: None
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    row: dict[str, Any] = {}
    with torch.no_grad(), decoder.sampling():
        requests = [Request(prompt, (i,)) for i in range(slots)]
        run = _Run(engine, requests, steps + 1, 1.0, Truncation())
        try:
            row["prefill_s"] = sum(timed(device, [run.admit]))

            def step() -> None:
                run.decode()
                run.look()

            for _ in range(WARM_STEPS):
                step()
            times = timed(device, [step] * options.steps)
            if profile:
                row["profile"] = profiled_kernels(device, step, options.profile)
            if device.type == "cuda":
                free, total = torch.cuda.mem_get_info(device)
                row["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
                row["outside_torch_bytes"] = total - free - torch.cuda.memory_reserved(device)
        finally:
            run.steps.close()
    seen = len(prompt) + WARM_STEPS + options.steps / 2
    row |= {
        "ms": statistics.median(times) * 1e3,
        "ms_slowest_tenth": sorted(times)[-max(1, len(times) // 10)] * 1e3,
        "captured": engine.stats.graphs,
        "capture_s": engine.stats.capture_s,
        "seen_entries": seen,
    }
    return row


def profiled_kernels(device: Any, step: Callable[[], None], most: int) -> list[dict[str, Any]]:
    """What takes longest on the device, milliseconds and launches a step."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED_STEPS):
            step()
    rows = []
    for event in profiler.key_averages():
        took_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if took_us > 0:
            ms = took_us / 1e3 / PROFILED_STEPS
            rows.append({"name": event.key[:100], "ms": ms, "launches": event.count / PROFILED_STEPS})
    return sorted(rows, key=lambda row: -row["ms"])[:most]


# --- peers


def peer_model(decoder: Any) -> Any:
    """Transformers' own model over the same tensors."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            decoder.config, attn_implementation="sdpa", dtype=decoder.weights.storage_dtype
        )
    model.load_state_dict(decoder.weights.tensors, strict=False, assign=True)
    if decoder.tied:
        model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=decoder.config).to(decoder.device)
    return model.to(decoder.device).eval()


def generate_times(model: Any, ids_BT: Any, steps: int) -> list[float]:
    """Seconds of each step of generate with a static cache, the second time (the first compiles)."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    device = ids_BT.device

    class Marks(StoppingCriteria):
        def __init__(self) -> None:
            self.marks: list[Any] = []

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            if device.type == "cuda":
                self.marks.append(torch.cuda.Event(enable_timing=True))
                self.marks[-1].record()
            else:
                self.marks.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=device)

    marks: list[Any] = []
    for _ in range(2):
        criterion = Marks()
        model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=WARM_STEPS + steps,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            cache_implementation="static",
            stopping_criteria=StoppingCriteriaList([criterion]),
            pad_token_id=0,
        )
        marks = criterion.marks[WARM_STEPS:]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
    return [b - a for a, b in pairwise(marks)]


def paged(page: int, **options: Any) -> Any:
    """Options of continuous batching; what holds a page's entries has another name in transformers 5.17."""
    from transformers import ContinuousBatchingConfig

    name = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"
    return ContinuousBatchingConfig(**{name: page}, **options)


def continuous_times(model: Any, ids_BT: Any, steps: int) -> list[float]:
    """Seconds of each step of continuous batching in which all requests get a token."""
    from transformers import GenerationConfig

    page, tokens = 256, WARM_STEPS + steps
    pages = -(-(ids_BT.shape[1] + tokens) // page)
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0
    )
    batching = paged(
        page,
        num_blocks=len(ids_BT) * pages,
        max_requests_per_batch=len(ids_BT),
        max_batch_tokens=max(PREFILL_TOKENS, len(ids_BT)),
    )
    done = model.generate_batch(
        inputs=ids_BT.tolist(),
        generation_config=config,
        continuous_batching_config=batching,
        record_timestamps=True,
        progress_bar=False,
    )
    failed = next((request.error for request in done.values() if request.error), None)
    if failed or len(done) < len(ids_BT):  # it logs what went wrong, and returns
        raise RuntimeError(failed or f"{len(ids_BT) - len(done)} of {len(ids_BT)} requests have no result")
    return steps_together([request.timestamps for request in done.values()])


def steps_together(marks: list[list[float]]) -> list[float]:
    """Seconds of the steps in which all requests were decoding, from the times of each one's tokens."""
    first, last = max(times[0] for times in marks), min(times[-1] for times in marks)
    latest = max(marks, key=lambda times: times[0])
    found = [b - a for a, b in pairwise(latest) if first <= a and b <= last]
    if not found:
        raise RuntimeError("the first requests had ended when the last ones began")
    return found


def peer(decoder: Any, kind: str, slots: int, entries: int, steps: int) -> dict[str, Any]:
    """A row of a peer; where it cannot run here, why."""
    import torch

    length = max(1, entries - WARM_STEPS - steps)
    ids_BT = torch.randint(1, decoder.config.vocab_size, (1, length)).expand(slots, -1)
    ids_BT = ids_BT.contiguous().to(decoder.device)
    measure = {"generate": generate_times, "continuous": continuous_times}[kind]
    if decoder.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(decoder.device)
    try:
        times = measure(peer_model(decoder), ids_BT, steps)
    except (RuntimeError, ValueError, TypeError, ImportError, AttributeError) as error:
        return {"left_out": f"{type(error).__name__}: {error}"[:300]}  # another version's API, or memory
    row = {"ms": statistics.median(times) * 1e3, "seen_entries": length + WARM_STEPS + steps / 2}
    if decoder.device.type == "cuda":
        row["reserved_bytes"] = torch.cuda.max_memory_reserved(decoder.device)
    return row


# --- one model in one form: a process


def one(options: argparse.Namespace, name: str, form: str) -> Iterator[dict[str, Any]]:
    """Rows of a model in a form, in the order of what is wanted most."""
    import torch

    from frugal_rl.decoder import Decoder

    began = time.monotonic()
    device, cap = torch.device(options.device), parse_bytes(options.cap)
    on_gpu = device.type == "cuda"
    capped(device, cap)
    bandwidth = copy_bandwidth(device, 1 << (30 if on_gpu else 24))
    yield {"kind": "ceiling", "copy_bytes_per_s": bandwidth}
    shape, _ = find_shape(name)
    config = make_config(shape)
    decoder = Decoder(config, make_weights(config, form, device))

    def row(kind: str, slots: int, entries: int, found: dict[str, Any], **more: Any) -> dict[str, Any]:
        out = {"kind": kind, "slots": slots, "entries": entries, **more, **found}
        if "ms" in found:
            weights, kv = bytes_to_move(decoder, slots, found["seen_entries"])
            bound_ms = (weights + kv) / bandwidth * 1e3
            out |= {"weight_bytes": weights, "kv_bytes": kv, "bound_ms": bound_ms}
            out |= {"ratio": bound_ms / found["ms"], "tokens_per_s": slots / found["ms"] * 1e3}
        return out

    graphs, kernels = options.graphs.split(","), options.kernels.split(",")
    slots, entries = ([int(n) for n in text.split(",")] for text in (options.slots, options.entries))
    shares = [float(x) for x in options.patch.split(",") if form == "int8" or float(x) == 0]
    for share in sorted(shares):
        if share:
            lay_patch_(decoder.weights, share)
        for of, count, on, way in product(entries, slots, graphs, kernels):
            more = {"patch": share, "graphs": on, "kernels": way}
            weights, kv = bytes_to_move(decoder, count, of)
            if time.monotonic() - began > options.seconds:
                yield row("engine", count, of, {"left_out": "no time left"}, **more)
                continue
            if on_gpu and weights + kv > cap:
                yield row("engine", count, of, {"left_out": f"needs {size(weights + kv)}"}, **more)
                continue
            os.environ["FRUGAL_RL_KERNELS"] = way
            profile = options.profile > 0 and count == options.peer_slots and on == "on"
            try:
                found = decode(decoder, count, of, options, graphs=on == "on", profile=profile)
            except torch.cuda.OutOfMemoryError:
                found = {"left_out": "out of memory"}
            yield row("engine", count, of, found, **more)
        if form == "bf16" and not share:
            for kind in filter(None, options.peers.split(",")):
                if time.monotonic() - began > options.seconds:
                    yield row(kind, options.peer_slots, entries[0], {"left_out": "no time left"})
                    continue
                found = peer(decoder, kind, options.peer_slots, entries[0], options.steps)
                yield row(kind, options.peer_slots, entries[0], found)


def schedule(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """How busy slots are until the queue is empty: a stop token in about 500, and a tiny model on the CPU."""
    import torch

    from frugal_rl.decoder import Decoder
    from frugal_rl.generate.engine import Engine
    from frugal_rl.memory import Shape
    from frugal_rl.rollout import Request

    config = make_config(Shape(1, 16, 16, 1, 1, 16, 512, tied=True))
    decoder = Decoder(config, make_weights(config, "bf16", torch.device("cpu")))
    prompts, samples, longest = (int(n) for n in options.batch.split(","))
    requests = [Request((n % 500,) * (1 + n % 7), (n, g)) for n in range(prompts) for g in range(samples)]
    for ahead in (0, 1, 8):
        engine = Engine(decoder, options.peer_slots, frozenset({511}), 1024, ahead=ahead)
        out = [r for _, r in engine.generate(requests, max_tokens=longest, temperature=1.0)]
        lengths = sorted(len(r.response_ids) for r in out)
        busy = engine.stats.queue_tokens / (engine.stats.queue_steps * engine.slots)
        yield {
            "kind": "schedule",
            "requests": len(requests),
            "slots": engine.slots,
            "ahead": ahead,
            "median_tokens": lengths[len(lengths) // 2],
            "longest_tokens": lengths[-1],
            "busy": busy,
            "queue_steps": engine.stats.queue_steps,
            "decode_steps": engine.stats.decode_steps,
        }


# --- the table


def environment(device: str) -> dict[str, Any]:
    import torch
    from bench_learn import commit

    cuda = device == "cuda"
    found: dict[str, Any] = {"commit": commit(), "torch": torch.__version__}
    for package in ("transformers", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["device"] = torch.cuda.get_device_name() if cuda else "cpu"
    return found | ({"capability": list(torch.cuda.get_device_capability())} if cuda else {})


def line_of(row: dict[str, Any]) -> str:
    """A row for people."""
    if row["kind"] == "ceiling":
        return f"copy bandwidth {row['copy_bytes_per_s'] / 1e9:.0f} GB/s (1e9 bytes)"
    if row["kind"] == "tests":
        return f"pytest -m gpu: exit code {row['exit_code']}, {row['summary']}"
    if row["kind"] == "schedule":
        return (
            f"{row['requests']} requests of {row['median_tokens']} tokens (median; at most "
            f"{row['longest_tokens']}) in {row['slots']} slots, ends read {row['ahead']} steps late: busy "
            f"{row['busy']:.1%} of {row['queue_steps']} steps, {row['decode_steps']} in all"
        )
    words = f"{row['kind']:<10} {row['slots']:>4} slots {row['entries']:>5} entries"
    if row["kind"] == "engine":
        words += f"  graphs {row['graphs']:<3} kernels {row['kernels']:<5} patch {row['patch']:.1%}"
    if "left_out" in row:
        return f"{words}  left out: {row['left_out']}"
    text = (
        f"{words}  {row['ms']:8.2f} ms/step {row['tokens_per_s']:8.0f} tokens/s  "
        f"bound {row['bound_ms']:.2f} ms "
        f"({size(row['weight_bytes'])} + {size(row['kv_bytes'])}), ratio {row['ratio']:.2f}"
    )
    for kernel in row.get("profile", []):
        text += f"\n    {kernel['ms']:8.3f} ms {kernel['launches']:7.1f} x {kernel['name']}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", default="Qwen2.5-1.5B,Qwen2.5-7B,Qwen2.5-14B")
    parser.add_argument("--forms", default="bf16,int8")
    parser.add_argument("--slots", default="1,16,64,128")
    parser.add_argument("--entries", default="640,4096")
    parser.add_argument("--graphs", default="on,off")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--patch", default="0,0.002")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--peers", default="generate,continuous")
    parser.add_argument("--peer-slots", type=int, default=64)
    parser.add_argument("--profile", type=int, default=12)
    parser.add_argument("--cap", default="24GiB")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=540, help="begin nothing after so many, in all")
    parser.add_argument("--tests", action="store_true", help="python -m pytest -m gpu, first")
    parser.add_argument("--schedule", action="store_true", help="count how busy slots are (on a CPU)")
    parser.add_argument("--batch", default="256,4,1024", help="of --schedule: prompts, samples, tokens")
    parser.add_argument("--json", type=Path, help="append a line a row to this file")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        for row in one(options, options.models, options.forms):
            print(json.dumps(row), flush=True)
        return
    began, about = time.monotonic(), environment(options.device)

    def show(row: dict[str, Any]) -> None:
        print(line_of(row), flush=True)
        if options.json:
            with open(options.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(row | about) + "\n")

    if options.tests:
        words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
        print(done.stdout)
        show({"kind": "tests", "exit_code": done.returncode, "summary": done.stdout.strip().splitlines()[-1]})
    for row in schedule(options) if options.schedule else []:
        show(row)
    same = ["slots", "entries", "graphs", "kernels", "patch", "steps"]
    same += ["peers", "peer_slots", "profile", "cap", "device"]
    for model, form in product(filter(None, options.models.split(",")), options.forms.split(",")):
        left = options.seconds - (time.monotonic() - began)
        if left <= 0:
            print(f"{model} {form}: left out, no time left", flush=True)
            continue
        print(f"{model} {form}", flush=True)
        words = [sys.executable, __file__, "--one", "--models", model, "--forms", form]
        for name in same:
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        process = subprocess.Popen([*words, "--seconds", str(left)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                show(json.loads(line) | {"model": model, "form": form})
        if process.wait():
            print(f"{model} {form} failed", flush=True)


if __name__ == "__main__":
    main()
