"""How GGUF stores entries: a block of them is encoded together, and decodes on its own.

    F32, F16, BF16   one entry a block, rounded to the nearest, ties to even
    Q8_0             32 entries: d = max|x| / 127 as float16, then 32 signed bytes round(x * (1 / d)),
                     halves away from zero; d before its own rounding is what divides (float32 throughout)

Law: `encode` gives the bits of libggml's own quantisers, so a file is the one that llama.cpp would have made.
Because a block depends on its own entries alone, a file can be changed block by block and be, in every
bit, the file that the changed checkpoint converts to.

Source: ggml-org/llama.cpp ggml/src/ggml-quants.c quantize_row_q8_0_ref, ggml/src/ggml-impl.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Format:
    """`code` is ggml's number. `encode`: float32 [N, block] -> uint8 [N, block_bytes]; `decode`: back."""

    name: str
    code: int
    block: int
    block_bytes: int
    encode: Callable[[Array], Array]
    decode: Callable[[Array], Array]

    def nbytes(self, entries: int) -> int:
        """Of so many entries, a multiple of the block."""
        return entries // self.block * self.block_bytes

    def holds(self, dtype: str) -> bool:
        """Whether every number of a checkpoint's dtype is stored without rounding."""
        return self.name == dtype or (self.name == "F32" and dtype in ("F16", "BF16"))


def _encode_f32(value_NX: Array) -> Array:
    return np.ascontiguousarray(value_NX, "<f4").view(np.uint8)


def _decode_f32(byte_NX: Array) -> Array:
    return np.ascontiguousarray(byte_NX).view("<f4")


def _encode_f16(value_NX: Array) -> Array:
    with np.errstate(over="ignore"):  # to infinity, as libggml does
        return np.ascontiguousarray(value_NX).astype("<f2").view(np.uint8)


def _decode_f16(byte_NX: Array) -> Array:
    return np.ascontiguousarray(byte_NX).view("<f2").astype(np.float32)


def _encode_bf16(value_NX: Array) -> Array:
    bits_NX = np.ascontiguousarray(value_NX, "<f4").view("<u4")
    rounded_NX = (bits_NX + 0x7FFF + (bits_NX >> 16 & 1)) >> 16  # numbers never wrap; NaN does not come here
    nan_NX = np.isnan(value_NX)
    return np.where(nan_NX, bits_NX >> 16 | 64, rounded_NX).astype("<u2").view(np.uint8)


def _decode_bf16(byte_NX: Array) -> Array:
    return (np.ascontiguousarray(byte_NX).view("<u2").astype("<u4") << 16).view("<f4")


def _encode_q8_0(value_NX: Array) -> Array:
    value_NX = np.ascontiguousarray(value_NX, np.float32)
    scale_N1 = np.abs(value_NX).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore", over="ignore"):
        factor_N1 = np.where(scale_N1 != 0, np.float32(1) / scale_N1, np.float32(0))
        scaled_NX = value_NX * factor_N1
    size_NX = np.abs(scaled_NX)
    whole_NX = np.floor(size_NX)
    whole_NX += size_NX - whole_NX >= 0.5  # halves away from zero, as C's roundf
    code_NX = np.copysign(whole_NX, scaled_NX).astype(np.int8)
    with np.errstate(over="ignore"):
        scale_N2 = scale_N1.astype("<f2").view(np.uint8)
    return np.concatenate([scale_N2, code_NX.view(np.uint8)], axis=1)


def _decode_q8_0(byte_NX: Array) -> Array:
    scale_N1 = np.ascontiguousarray(byte_NX[:, :2]).view("<f2").astype(np.float32)
    return np.ascontiguousarray(byte_NX[:, 2:]).view(np.int8) * scale_N1


FORMATS = {
    "F32": Format("F32", 0, 1, 4, _encode_f32, _decode_f32),
    "F16": Format("F16", 1, 1, 2, _encode_f16, _decode_f16),
    "BF16": Format("BF16", 30, 1, 2, _encode_bf16, _decode_bf16),
    "Q8_0": Format("Q8_0", 8, 32, 34, _encode_q8_0, _decode_q8_0),
}
BY_CODE = {form.code: form for form in FORMATS.values()}
# what ggml calls the formats that are not changed here: for messages
OTHERS = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K",
    14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


def name_of(code: int) -> str:
    """ggml's name of a format, or its number."""
    return BY_CODE[code].name if code in BY_CODE else OTHERS.get(code, f"number {code}")


def values_of_bits(dtype: str, bits: Array) -> Array:
    """The float32 values of a checkpoint's entries, given as unsigned integers. BF16, F16 or F32."""
    return FORMATS[dtype].decode(np.ascontiguousarray(bits).view(np.uint8)).reshape(bits.shape)


def bits_of_values(dtype: str, value_N: Array) -> Array | None:
    """Inverse of `values_of_bits` over [N]; None where a value is none of that dtype."""
    bits_N = FORMATS[dtype].encode(value_N[:, None])
    same = FORMATS[dtype].decode(bits_N).reshape(-1).view("<u4") == np.ascontiguousarray(value_N).view("<u4")
    return bits_N.reshape(-1).view(f"<u{FORMATS[dtype].block_bytes}") if same.all() else None
