"""Compile the learner's kernels for GPUs that need not be there: python tests/compile_kernels.py 86 120

Prints a line a kernel and capability. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from frugal_rl.kernels import dequantise, propose

POINTERS = {
    "code_OI": "*i8",
    "absmax_O": "*fp32",
    "out_bits_RI": "*i16",
    "position_N": "*i64",
    "overlay_N": "*i64",
    "changed_bits_N": "*i16",
    "before_bits_N": "*i16",
    "begin_X": "*i32",
    "gradient_RI": "*fp32",
    "gradient_N": "*fp32",
    "row_R": "*i64",
    "weight_OI": "*i16",
    "step_1": "*fp32",
    "map_X": "*i32",
    "count_X": "*i32",
    "square_X": "*fp32",
    "start_X": "*i64",
}
NUMBERS = {"reciprocal": "fp32", "least_absmax": "fp32", "first_row": "i32", "width": "i32"}
BF16 = {"FORMAT": 0, "OUT": 0, "LANES": dequantise.OVERLAID, "BLOCK": dequantise.TILE}
WHOLE = {**BF16, "QUANTISED": False, "HAS_ROWS": False, "HAS_OVERLAY": False}
INT8 = {**BF16, "QUANTISED": True, "HAS_ROWS": True, "HAS_OVERLAY": True}
KERNELS: list[tuple[str, Any, dict[str, Any], dict[str, str]]] = [
    ("dequantise", dequantise._dequantise, INT8, {}),
    ("mark", propose._mark, WHOLE, {}),
    ("mark int8", propose._mark, INT8, {"weight_OI": "*i8"}),
    ("gather int8", propose._gather, INT8, {"weight_OI": "*i8", "position_N": "*i32"}),
]


def compiled(kernel: Any, choices: dict[str, Any], types: dict[str, str], capability: int) -> dict[str, Any]:
    names = [parameter.name for parameter in kernel.params]
    known = {**POINTERS, **NUMBERS, **types}
    signature = {name: known.get(name, "constexpr") for name in names}
    constants = {(i,): choices[name] for i, name in enumerate(names) if name not in known}
    # as the launcher finds it: pointers, and widths of real models, are multiples of 16
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name == "width"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        for name, kernel, choices, types in KERNELS:
            code = compiled(kernel, choices, types, capability)
            fused = code["ptx"].count("fma.rn")
            print(f"sm_{capability} {name}: {len(code['cubin'])} bytes, {fused} fused multiply-adds")


if __name__ == "__main__":
    main()
