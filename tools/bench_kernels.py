"""The decode kernels against the memory bandwidth: int8 products with and without a patch, and attention.

    python tools/bench_kernels.py [--models Qwen2.5-1.5B,Qwen2.5-7B,Qwen2.5-14B] [--tokens 1,16,64,128]
    python tools/bench_kernels.py --sweep --models Qwen2.5-7B --tokens 64      which configuration is fastest
    TRITON_INTERPRET=1 python tools/bench_kernels.py --device cpu  tries the script itself, on a tiny shape

First the ceiling: bytes read and written by a device-to-device copy, a second. Then, for every matrix of a
layer and the head, the time of the int8 kernel with 0 %, 0.02 % and 0.2 % of the entries changed, and of a
bf16 product (cuBLAS); for 640 entries a slot, all alike and of ragged lengths, the time of the kernel and of
PyTorch's SDPA with a mask. GiB/s counts what has to move (codes, scales, x and y; live keys and values),
and `of ceiling` is its ratio to the copy. Each result is held against plain PyTorch in the same run.

A launch finds nothing of its matrix in the cache: launches go round over copies that together have
ROUND_BYTES. They are captured in one CUDA graph, so Python's own time does not count; medians of replays.
Limits to be met: 7B, 64 slots: int8 at least 60 % and bf16 75 % of the bandwidth bound for a whole step
(tools/bench_decode.py), a patch of 0.2 % under 8 %. Memory is capped at 24 GiB. Not run on a GPU yet.

A first run compiles, about 2 seconds a kernel: for the sweep of a 7B shape 129 at 64 tokens, 513 at all four.
--json is written after every matrix.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["FRUGAL_RL_KERNELS"] = "triton"

import torch
import triton
from bench_learn import capped

from frugal_rl.config import parse_bytes
from frugal_rl.kernels.attention import decode_attention
from frugal_rl.kernels.matmul import Config, Inputs, Matrix, choose, processors
from frugal_rl.memory import Shape
from frugal_rl.shapes import find_shape
from frugal_rl.storage import Overlay, Quantised, bits_of

GIB = 1 << 30
ROUND_BYTES = 512 << 20  # several times the second-level cache of any GPU
REPLAYS = 20
ENTRIES = 640
TINY = Shape(1, 64, 112, 4, 2, 16, 90, tied=True)
SHARES = (0.0, 0.0002, 0.002)


def seconds(steps: list[Callable[[], object]], device: torch.device) -> float:
    """Median time of a step, all of them in a row."""
    for step in steps[:2]:
        step()  # compiles
    if device.type == "cpu":
        began = time.perf_counter()
        steps[0]()
        return time.perf_counter() - began
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    graph.replay()
    taken = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        taken.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(taken) / len(steps)


def ceiling(device: torch.device) -> float:
    """Bytes a second of a copy, read and written."""
    many = GIB if device.type == "cuda" else 16 << 20
    source, target = (torch.empty(many, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * many / seconds([lambda: target.copy_(source)] * 3, device)


def copies(nbytes: int, device: torch.device) -> int:
    return max(1, min(64, ROUND_BYTES // nbytes)) if device.type == "cuda" else 1


def matrices(shape: Shape) -> dict[str, tuple[int, int]]:
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    return {
        "q": (queries, shape.hidden),
        "k": (keys, shape.hidden),
        "o": (shape.hidden, queries),
        "gate": (shape.intermediate, shape.hidden),
        "down": (shape.hidden, shape.intermediate),
        "head": (shape.vocabulary, shape.hidden),
    }


def held(rows: int, width: int, share: float, device: torch.device) -> Quantised:
    """Random codes, and random values over that share of the entries."""
    code_OI = torch.randint(-127, 128, (rows, width), dtype=torch.int8, device=device)
    made = Quantised(code_OI, torch.rand(rows, device=device) * 0.03 + 0.02)
    count = int(rows * width * share)
    if count:
        position_N = torch.randint(0, rows * width, (count,), device=device).unique()
        # as a step of SGD does: near the base
        policy_N = made.at(position_N).float() + torch.randn(len(position_N), device=device) * 1e-4
        made.overlay = Overlay(position_N, bits_of(policy_N.bfloat16()))
    return made


def multiplier(matrix: Quantised) -> Matrix:
    entries = matrix.difference()
    base_N, policy_N = (bits.view(matrix.dtype) for bits in (entries.before_bits_N, entries.after_bits_N))
    return Matrix(matrix.code_OI, matrix.absmax_O, (entries.position_N, base_N, policy_N), Inputs())


def multiply(x_MI: torch.Tensor, dtype: torch.dtype, config: Config, kernel: Matrix) -> torch.Tensor:
    """One product that shares nothing with the one before, as o and down have it (q, k and v share x^T)."""
    kernel.inputs.forget()
    return kernel.product(x_MI, dtype=dtype, config=config)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


def products(
    name: str, rows: int, width: int, tokens: list[int], options: argparse.Namespace, top: float
) -> list[dict[str, Any]]:
    device, compute = options.torch_device, options.compute
    count = copies(rows * width, device)
    dtype = torch.float32 if name == "head" else compute
    found = []
    for share in SHARES if not options.sweep else SHARES[:1]:
        made = [held(rows, width, share, device) for _ in range(count)]
        kernels = [multiplier(matrix) for matrix in made]
        for many in tokens:
            x_MI = torch.randn(many, width, dtype=compute, device=device)
            must = rows * width + 4 * rows + many * (width * x_MI.element_size() + rows * dtype.itemsize)
            row = {
                "kind": "int8",
                "matrix": name,
                "rows": rows,
                "width": width,
                "tokens": many,
                "changed": share,
            }
            config = choose(many, rows, width, processors(device))
            if options.sweep:
                row |= fastest(kernels, x_MI, dtype, config, device)
            else:
                step = partial(multiply, x_MI, dtype, config)
                row["seconds"] = seconds([partial(step, kernel) for kernel in kernels], device)
            want = x_MI @ made[0].rows(slice(0, rows), compute).T
            row["error"] = error(multiply(x_MI, dtype, config, kernels[0]), want)
            row |= {"gib_per_s": must / row["seconds"] / GIB, "of_ceiling": must / row["seconds"] / top}
            show(row)
            found.append(row)
        del made, kernels
    if options.sweep:
        return found
    dense = [
        torch.randn(rows, width, dtype=compute, device=device)
        for _ in range(copies(2 * rows * width, device))
    ]
    for many in tokens:
        x_MI = torch.randn(many, width, dtype=compute, device=device)
        must = (rows * width + many * (width + rows)) * x_MI.element_size()
        step = partial(torch.nn.functional.linear, x_MI)
        taken = seconds([partial(step, weight_OI) for weight_OI in dense], device)
        row = {"kind": "bf16", "matrix": name, "rows": rows, "width": width, "tokens": many, "seconds": taken}
        row |= {"gib_per_s": must / taken / GIB, "of_ceiling": must / taken / top}
        show(row)
        found.append(row)
    return found


def fastest(
    kernels: list[Matrix], x_MI: torch.Tensor, dtype: torch.dtype, chosen: Config, device: torch.device
) -> dict[str, Any]:
    """The time of the configuration that is chosen, and of the best of many."""
    taken = {}
    grid = itertools.product((64, 128), (64, 128), (4, 8), (3, 4, 5), (1, 2, 4, 8))
    wanted = [
        replace(chosen, block_o=o, block_i=i, warps=w, stages=s, registers=None, parts=p)
        for o, i, w, s, p in grid
        if (o * i + 2 * chosen.block_m * i) * (s - 1) <= 64 << 10 and p * 4 <= -(-x_MI.shape[1] // i)
    ]
    for config in [chosen, *wanted]:
        step = partial(multiply, x_MI, dtype, config)
        try:
            taken[config] = seconds([partial(step, kernel) for kernel in kernels], device)
        except triton.OutOfResources:
            continue
    best = min(taken, key=taken.__getitem__)
    return {
        "seconds": taken[chosen],
        "chosen": vars(chosen),
        "fastest": vars(best),
        "fastest_seconds": taken[best],
        "tried": len(taken),
    }


def from_kernel(
    query: torch.Tensor, length_S: torch.Tensor, arrived: torch.Tensor, scale: float, cache: torch.Tensor
) -> torch.Tensor:
    return decode_attention(query, cache[0], cache[1], length_S, arrived, scale)


def from_sdpa(grouped: torch.Tensor, mask: torch.Tensor, scale: float, cache: torch.Tensor) -> torch.Tensor:
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(grouped, cache[0], cache[1], attn_mask=mask, scale=scale)


def attentions(
    shape: Shape, tokens: list[int], options: argparse.Namespace, top: float
) -> list[dict[str, Any]]:
    device, compute = options.torch_device, options.compute
    entries = ENTRIES if device.type == "cuda" else 40
    found = []
    for slots, ragged in itertools.product(tokens, (False, True)):
        size = (slots, shape.kv_heads, entries, shape.head_size)
        nbytes = 2 * slots * shape.kv_heads * entries * shape.head_size * compute.itemsize
        caches = [torch.randn(2, *size, dtype=compute, device=device) for _ in range(copies(nbytes, device))]
        query = torch.randn(slots, shape.heads, shape.head_size, dtype=compute, device=device)
        least = 1 if ragged else entries
        length_S = torch.randint(least, entries + 1, (slots,), device=device)
        arrived = torch.zeros(slots * shape.kv_heads, dtype=torch.int32, device=device)
        scale = shape.head_size**-0.5
        mask = (torch.arange(entries, device=device) < length_S[:, None])[:, None, None]
        grouped = query.view(slots, shape.kv_heads, -1, shape.head_size)

        kernel = partial(from_kernel, query, length_S, arrived, scale)
        plain = partial(from_sdpa, grouped, mask, scale)
        must = nbytes * float(length_S.sum()) / (slots * entries) + 2 * query.nbytes
        row: dict[str, Any] = {"kind": "attention", "slots": slots, "entries": entries, "ragged": ragged}
        row["seconds"] = seconds([partial(kernel, cache) for cache in caches], device)
        row["sdpa_seconds"] = seconds([partial(plain, cache) for cache in caches], device)
        row["error"] = error(kernel(caches[0]), plain(caches[0]).reshape(query.shape))
        row |= {"gib_per_s": must / row["seconds"] / GIB, "of_ceiling": must / row["seconds"] / top}
        show(row)
        found.append(row)
    return found


def show(row: dict[str, Any]) -> None:
    if row["kind"] == "attention":
        what = f"attention, {row['slots']} slots{', ragged' if row['ragged'] else ''}"
    else:
        what = f"{row['kind']} {row['matrix']} {row['rows']} x {row['width']}, {row['tokens']} tokens"
        what += f", {row['changed']:.2%} changed" if row.get("changed") else ""
    more = f", error {row['error']:.1e}" if "error" in row else ""
    more += f", SDPA {row['sdpa_seconds'] * 1e6:.1f} us" if "sdpa_seconds" in row else ""
    more += f", fastest {row['fastest_seconds'] * 1e6:.1f} us {row['fastest']}" if "fastest" in row else ""
    print(
        f"{what:<52} {row['seconds'] * 1e6:>9.1f} us {row['gib_per_s']:>8.1f} GiB/s "
        f"{row['of_ceiling']:>6.1%} of ceiling{more}",
        flush=True,
    )


def main() -> None:
    from bench_learn import commit

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", default="Qwen2.5-1.5B,Qwen2.5-7B,Qwen2.5-14B")
    parser.add_argument("--tokens", default="1,16,64,128")
    parser.add_argument("--cap", default="24GiB")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sweep", action="store_true", help="time many configurations of each product")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    options = parser.parse_args()
    device = options.torch_device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    options.compute = torch.bfloat16 if on_gpu else torch.float32
    torch.manual_seed(0)
    capped(device, parse_bytes(options.cap))
    models = {name: find_shape(name)[0] for name in options.models.split(",")} if on_gpu else {"tiny": TINY}
    tokens = [int(many) for many in options.tokens.split(",")] if on_gpu else [1, 9]
    top = ceiling(device)
    print(f"copy: {top / GIB:.1f} GiB/s", flush=True)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "commit": commit(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_gib_per_s": top / GIB,
        "models": {},
    }
    for name, shape in models.items():
        print(name, flush=True)
        parts = [partial(products, matrix, *sizes) for matrix, sizes in matrices(shape).items()]
        parts += [] if options.sweep else [partial(attentions, shape)]
        rows = result["models"][name] = []
        for part in parts:
            rows += part(tokens, options, top)
            if options.json:  # what was measured outlives a run that is stopped
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
