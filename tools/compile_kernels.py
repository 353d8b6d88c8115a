"""Compile the decode kernels for GPUs that need not be there, in the configurations that real shapes choose.

    python tools/compile_kernels.py [--capabilities 86,89,90,120] [--only attention] [--json FILE]

Every launch of `Matrix.product`, `decode_attention` and what stands between them (kernels/fused.py), at the
Qwen2.5-7B shapes, is caught before it happens and compiled as Triton's launcher would, ptxas included: 1, 16,
32, 64 and 128 tokens, with and without a patch, with and without programs that share rows. Printed for each:
registers a thread, bytes of its stack (what did not fit into registers), shared memory. Exit code 1 where a
kernel does not compile, takes more than the 99 KiB of shared memory that a program may have on capability
8.6, 8.9 and 12.0, or has a stack of more than STACK_BYTES. Needs no GPU; TRITON_INTERPRET must not be set.
About six minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

MOST_SHARED_BYTES = 99 << 10
STACK_BYTES = 64  # of a thread: a few values, moved once
PROCESSORS = 128  # of a 4090
TYPES = {"int8": "i8", "uint8": "u8", "int32": "i32", "int64": "i64", "float32": "fp32", "bfloat16": "bf16"}


class Caught:
    """Stands in for a kernel: keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.launches.append((args, options))


def specialise(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The source as the launcher would have it compiled, and the compiler's options."""
    from triton.compiler import ASTSource

    names = [p.name for p in kernel.params]
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in options.items() if k in names}
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], list[list[object]]] = {}
    for index, parameter in enumerate(kernel.params):
        value, free = values[parameter.name], parameter.do_not_specialize
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not free):
            signature[parameter.name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            multiple = value % 16 == 0 and not free
        elif isinstance(value, float):
            signature[parameter.name], multiple = "fp32", False
        else:
            signature[parameter.name] = "*" + TYPES[str(value.dtype).removeprefix("torch.")]
            multiple = value.data_ptr() % 16 == 0
        if multiple:
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return source, {k: v for k, v in options.items() if k not in names and v is not None}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes of a thread, from the compiled file itself."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = {word: re.search(rf"{word}:(\d+)", done.stdout) for word in ("REG", "STACK")}
    assert all(found.values()), done.stdout
    return {"registers": int(found["REG"][1]), "stack_bytes": int(found["STACK"][1])}  # type: ignore[index]


def products(matmul: Any) -> list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Launches of products, named."""
    import torch

    launches = []
    for rows, width, biased, dtype in [(3584, 3584, True, None), (152064, 3584, False, torch.float32)]:
        code_OI = torch.empty(rows, width, dtype=torch.int8)
        absmax_O = torch.empty(rows)
        for changed in (0, 64):
            position_N = torch.arange(changed)
            value_N = torch.zeros(changed, dtype=torch.bfloat16)
            matrix = matmul.Matrix(code_OI, absmax_O, (position_N, value_N, value_N), matmul.Inputs())
            for tokens in (1, 16, 32, 64, 128):
                x_MI = torch.empty(tokens, width, dtype=torch.bfloat16)
                bias_O = torch.empty(rows, dtype=torch.bfloat16) if biased else None
                product, transpose = Caught(matmul._product), Caught(matmul._transpose)
                with (
                    mock.patch.object(matmul, "_product", product),
                    mock.patch.object(matmul, "_transpose", transpose),
                ):
                    matrix.product(x_MI, bias_O, dtype)
                name = f"product, {tokens} tokens, {'head' if dtype else 'shared rows'}"
                name += ", patch" if changed else ""
                launches.append((name, product.kernel, *product.launches[0]))
                if tokens == 64 and biased:
                    launches += [("transpose, 64 tokens", transpose.kernel, *x) for x in transpose.launches]
    return launches


def attentions(attention: Any) -> list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Launches of attention, named."""
    import torch

    launches = []
    for heads, kv_heads, size in [(28, 4, 128), (14, 2, 64), (32, 32, 96)]:
        cache = torch.empty(2, 16, kv_heads, 640, size, dtype=torch.bfloat16)
        query_SHD = torch.empty(16, heads, size, dtype=torch.bfloat16)
        length_S, arrived = torch.ones(16, dtype=torch.int64), torch.zeros(16 * kv_heads, dtype=torch.int32)
        caught = Caught(attention._decode)
        with mock.patch.object(attention, "_decode", caught):
            attention.decode_attention(query_SHD, cache[0], cache[1], length_S, arrived, 0.1)
        name = f"attention, {heads} heads on {kv_heads} of {size}"
        launches.append((name, caught.kernel, *caught.launches[0]))
    return launches


def between(fused: Any) -> list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """Launches of what stands between two products, named."""
    import torch

    launches = []
    new = lambda *shape: torch.empty(shape, dtype=torch.bfloat16)  # noqa: E731
    for heads, kv_heads, size, width, inner in [(28, 4, 128, 3584, 18944), (14, 2, 64, 896, 4864)]:
        key_SKCD, value_SKCD = new(2, 16, kv_heads, 640, size)
        cos_SD, sin_SD = new(2, 16, size)
        query_SHD, key_SKD = new(16, heads, size), new(16, kv_heads, size)
        entry_S = torch.zeros(16, dtype=torch.int64)
        kernels = {name: Caught(getattr(fused, name)) for name in ("_norm", "_rotate", "_gated")}
        with mock.patch.multiple(fused, **kernels):
            fused.norm(new(16, width), new(width), 1e-6)
            fused.add_norm(new(16, width), new(16, width), new(width), 1e-6)
            fused.norm(query_SHD, new(size), 1e-6)
            turns = cos_SD, sin_SD
            fused.rotate_and_keep(query_SHD, key_SKD, key_SKD, *turns, key_SKCD, value_SKCD, entry_S)
            fused.gated(new(16, inner), new(16, inner))
        for name, caught in kernels.items():
            launches += [(f"{name[1:]}, width {width}", caught.kernel, *launch) for launch in caught.launches]
    return launches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--capabilities", default="86,89,90,120")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    parser.add_argument("--only", default="", help="kernels whose name begins so")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    import triton
    from triton.backends.compiler import GPUTarget

    from frugal_rl.kernels import attention, fused, matmul

    warnings.simplefilter("ignore")
    with mock.patch.object(matmul, "processors", lambda device: PROCESSORS):
        launches = products(matmul) + attentions(attention) + between(fused)
    launches = [launch for launch in launches if launch[0].startswith(options.only)]
    rows, bad = [], 0
    for capability in map(int, options.capabilities.split(",")):
        for name, kernel, args, choices in launches:
            source, chosen = specialise(kernel, args, choices)
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=chosen)
            row = {
                "capability": capability,
                "kernel": name,
                **resources(made.asm["cubin"]),
                "shared_bytes": made.metadata.shared,
                "tensor_core_products": len(re.findall(r"mma\.sync|wgmma\.mma", made.asm["ptx"])),
            }
            rows.append(row)
            fine = row["shared_bytes"] <= MOST_SHARED_BYTES and row["stack_bytes"] <= STACK_BYTES
            bad += not fine
            print(
                f"{capability / 10:>4} {name:<40} {row['registers']:>4} registers "
                f"{row['stack_bytes']:>4} B stack {row['shared_bytes'] / 1024:>5.1f} KiB shared"
                f"{'' if fine else ' TOO MUCH'}",
                flush=True,
            )
    print(f"{len(rows)} kernels, {bad} of them take too much; triton {triton.__version__}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
