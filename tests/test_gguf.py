"""GGUF files: blocks as libggml encodes them, a container that others read, logits as torch has them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from frugal_rl.errors import InputError
from frugal_rl.gguf.file import F32, STRING, U32, Gguf, Planned, is_gguf, write
from frugal_rl.gguf.formats import FORMATS, bits_of_values, values_of_bits
from frugal_rl.gguf.layout import metadata_of, rope_factors, row_in_checkpoint, row_in_gguf
from frugal_rl.gguf.write import Values, convert, tensors_of, write_gguf
from frugal_rl.models import find_model

from .conftest import KINDS, make_config, make_model, needs_llama

SIZES = {"intermediate_size": 96}  # rows of three Q8_0 blocks: conftest's 112 is no multiple of 32
# largest difference of a logit that the format explains: 3 layers, logits of up to about 3.5; the cache is
# float16, which alone makes 2e-3; bf16 rounds activations too, q8_0 both to 8 bits
TOLERANCE = {"f32": 5e-3, "f16": 1e-2, "bf16": 5e-2, "q8_0": 1e-1}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}


def awkward_values() -> np.ndarray:
    """Rows of 32: Gaussian of many sizes, zeros, halves, one outlier, numbers beside float16's limits."""
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((64, 32)) * 10.0**e for e in range(-12, 4)]
    special = np.zeros((5, 32))
    special[1, 3] = -0.0
    special[2] = np.arange(32) - 15.5
    special[2, 0] = 127  # the scale is 1: halves are halves
    special[3, 7] = 65504.0
    special[4] = np.arange(32) * 2.0**-26
    return np.concatenate([*rows, special]).astype(np.float32)


def test_a_bf16_that_is_no_number_keeps_its_sign_and_its_highest_bits_and_stays_none() -> None:
    """As libggml: the low half is cut off, and the bit that makes it quiet is set."""
    bits = np.array([0x7FC00000, 0xFF800001, 0x7FA5FFFF, 0xFFFFFFFF], "<u4")
    encoded = FORMATS["BF16"].encode(bits.view("<f4")[:, None]).view("<u2")
    assert encoded.reshape(-1).tolist() == [0x7FC0, 0xFFC0, 0x7FE5, 0xFFFF]


def test_a_bf16_is_the_nearest_and_of_two_the_even_one() -> None:
    low = np.array([0x0000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], "<u4")
    bits = np.concatenate([0x3F800000 + low, 0xBF810000 + low, [0x7F7F8000]]).astype("<u4")
    encoded = FORMATS["BF16"].encode(bits.view("<f4")[:, None]).view("<u2").reshape(-1)
    even, odd = [0x3F80, 0x3F80, 0x3F80, 0x3F81, 0x3F81], [0xBF81, 0xBF81, 0xBF82, 0xBF82, 0xBF82]
    assert encoded.tolist() == [*even, *odd, 0x7F80]
    rounded = torch.from_numpy(bits.view("<f4")).bfloat16().view(torch.int16).numpy().view("<u2")
    assert (encoded == rounded).all()


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_are_those_of_the_gguf_package(name: str) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install '.[test]'")
    form, value = FORMATS[name], awkward_values()
    ours = form.encode(value.reshape(-1, form.block))
    theirs = gguf.quants.quantize(value, gguf.GGMLQuantizationType(form.code))
    assert np.array_equal(ours.reshape(-1), theirs.view(np.uint8).reshape(-1))
    back = gguf.quants.dequantize(theirs, gguf.GGMLQuantizationType(form.code))
    assert np.array_equal(form.decode(ours).reshape(-1), np.asarray(back, np.float32).reshape(-1))


@needs_llama
@pytest.mark.parametrize("name", FORMATS)
def test_blocks_are_those_of_libggml(name: str) -> None:
    from frugal_rl.generate.llama_library import Library

    form = FORMATS[name]
    value_NX = np.ascontiguousarray(awkward_values().reshape(-1, form.block))
    out = np.empty((len(value_NX), form.block_bytes), np.uint8)
    quantise = Library.load().quantise
    quantise(form.code, value_NX.ctypes.data, out.ctypes.data, 0, *value_NX.shape, None)
    assert np.array_equal(form.encode(value_NX), out)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_bits_of_a_checkpoint_and_their_values_are_one(dtype: str) -> None:
    unsigned = f"<u{FORMATS[dtype].block_bytes}"
    bits_N = np.random.default_rng(1).integers(0, 2**15, 1000).astype(unsigned)
    if dtype == "F32":
        bits_N = bits_N << 16 | bits_N
    value_N = values_of_bits(dtype, bits_N)
    value_N = value_N[np.isfinite(value_N)]
    assert np.array_equal(values_of_bits(dtype, bits_of_values(dtype, value_N)), value_N)


def test_a_value_that_a_dtype_does_not_have_is_none_of_it() -> None:
    assert bits_of_values("BF16", np.float32([1 + 2**-9])) is None
    assert bits_of_values("F16", np.float32([1e-9])) is None


def test_a_format_holds_what_it_does_not_round() -> None:
    holds = {
        (form, dtype): FORMATS[form].holds(dtype) for form in FORMATS for dtype in ("BF16", "F16", "F32")
    }
    assert {pair for pair, yes in holds.items() if yes} == {
        ("F32", "F32"), ("F32", "F16"), ("F32", "BF16"), ("F16", "F16"), ("BF16", "BF16"),
    }  # fmt: skip


# --- the container


def small_file(path: Path) -> Path:
    data = np.arange(8, dtype=np.float32)
    tensor = Planned("w", (2, 4), FORMATS["F32"], [data[:4].view(np.uint8), data[4:].view(np.uint8)])
    keys = {"a": (U32, 7), "b": (STRING, ["x", "yz"]), "c": (F32, 0.5)}
    write(path, keys, [tensor, Planned("v", (1,), FORMATS["F32"], [data[1:2].view(np.uint8)])])
    return path


def test_golden_bytes(tmp_path: Path) -> None:
    def text(s: str) -> bytes:
        return struct.pack("<Q", len(s)) + s.encode()

    header = b"GGUF" + struct.pack("<IQQ", 3, 2, 3)
    header += text("a") + struct.pack("<II", 4, 7)
    header += text("b") + struct.pack("<IIQ", 9, 8, 2) + text("x") + text("yz")
    header += text("c") + struct.pack("<If", 6, 0.5)
    header += text("w") + struct.pack("<IQQIQ", 2, 4, 2, 0, 0)
    header += text("v") + struct.pack("<IQIQ", 1, 1, 0, 32)
    header += bytes(-len(header) % 32)
    data = np.arange(8, dtype="<f4").tobytes() + struct.pack("<f", 1.0) + bytes(28)
    assert small_file(tmp_path / "g.gguf").read_bytes() == header + data


def test_reading_gives_back_what_was_written_without_the_arrays(tmp_path: Path) -> None:
    gguf = Gguf.read(small_file(tmp_path / "g.gguf"))
    assert gguf.metadata == {"a": 7, "c": 0.5}
    blocks = gguf.blocks(gguf.tensors["w"], "r")
    assert gguf.tensors["w"].shape == (2, 4) and blocks.shape == (8, 4)
    assert np.array_equal(blocks.reshape(-1).view("<f4"), np.arange(8))


def test_the_gguf_package_reads_what_was_written(tmp_path: Path) -> None:
    package = pytest.importorskip("gguf", reason="needs the gguf package: pip install '.[test]'")
    reader = package.GGUFReader(small_file(tmp_path / "g.gguf"))
    first = reader.tensors[0]
    assert (first.name, first.data.tolist()) == ("w", [[0, 1, 2, 3], [4, 5, 6, 7]])
    assert reader.fields["b"].contents() == ["x", "yz"]


def test_a_file_cut_anywhere_is_refused_by_name(tmp_path: Path) -> None:
    whole = small_file(tmp_path / "g.gguf").read_bytes()
    for length in range(len(whole) - 28):  # the last 28 bytes are filling
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.gguf: is no (whole )?GGUF file"):
            Gguf.read(path)


def test_any_damaged_header_is_refused_or_read_and_never_crashes(tmp_path: Path) -> None:
    whole = bytearray(small_file(tmp_path / "g.gguf").read_bytes())
    rng = np.random.default_rng(5)
    for _ in range(500):
        damaged = bytearray(whole)
        for place in rng.integers(0, 200, 3):
            damaged[place] = rng.integers(0, 256)
        (tmp_path / "d.gguf").write_bytes(damaged)
        try:
            Gguf.read(tmp_path / "d.gguf")
        except InputError as error:
            assert "d.gguf" in str(error)


@pytest.mark.parametrize(
    ("at", "value", "why"),
    [(4, 9, "version 9"), (8, 2**40, "0 dimensions"), (16, 2**40, "goes on beyond")],
)
def test_what_a_header_claims_is_not_believed(at: int, value: int, why: str, tmp_path: Path) -> None:
    data = bytearray(small_file(tmp_path / "g.gguf").read_bytes())
    data[at : at + (4 if at == 4 else 8)] = value.to_bytes(4 if at == 4 else 8, "little")
    (tmp_path / "g.gguf").write_bytes(data)
    with pytest.raises(InputError, match=why):
        Gguf.read(tmp_path / "g.gguf")


def test_a_failure_while_writing_leaves_no_trace(tmp_path: Path) -> None:
    def chunks() -> Any:
        yield np.zeros(4, np.uint8)
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="disk"):
        write(tmp_path / "g.gguf", {}, [Planned("w", (2,), FORMATS["F32"], chunks())])
    assert list(tmp_path.iterdir()) == []


def test_what_is_a_gguf_is_told_by_its_first_bytes_or_its_name(tmp_path: Path) -> None:
    path = small_file(tmp_path / "named_otherwise")
    assert is_gguf(path) and is_gguf(tmp_path / "missing.gguf")
    (tmp_path / "text").write_text("hello")
    assert not is_gguf(tmp_path / "text") and not is_gguf(tmp_path) and not is_gguf(Path("tiny"))


# --- models


def test_rows_stand_where_llama_cpp_wants_them_and_come_back() -> None:
    rows = np.arange(24)
    slow = rows.reshape(3, 2, 4).swapaxes(1, 2).reshape(-1)  # conversion/llama.py's permute
    assert np.array_equal(row_in_checkpoint(24, 3), slow)
    assert np.array_equal(row_in_gguf(24, 3)[slow], rows)
    assert np.array_equal(row_in_gguf(24, None), rows)


def saved(kind: str, folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, Any]:
    """A random model and its folder's files."""
    model = make_model(make_config(kind, **{**SIZES, **changes}), dtype=dtype)
    model.save_pretrained(folder)
    return model, find_model(str(folder))


def llama_logits(path: Path, ids: list[int]) -> np.ndarray:
    """After each token [T, V], by llama.cpp."""
    from frugal_rl.generate.llama_library import Library, LlamaModel

    model = LlamaModel(Library.load(), path, threads=1, on_gpu=False)
    with model.context(sequences=1, cells=len(ids), batch_tokens=len(ids)) as context:
        rows = [
            context.decode(*(np.asarray([x]) for x in (token, i, 0, True))).copy()
            for i, token in enumerate(ids)
        ]
    model.close()
    return np.concatenate(rows)


def torch_logits(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model.float()(torch.tensor([ids])).logits[0].numpy())


@needs_llama
@pytest.mark.parametrize("form", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_torchs_within_the_formats_error(kind: str, form: str, tmp_path: Path) -> None:
    tied = kind in ("qwen2", "mistral")
    model, files = saved(kind, tmp_path / "hf", dtype=torch.bfloat16, tie_word_embeddings=tied)
    convert(files, tmp_path / "m.gguf", form, None)
    ids = np.random.default_rng(2).integers(6, 90, 40).tolist()
    ours, theirs = llama_logits(tmp_path / "m.gguf", ids), torch_logits(model, ids)
    assert np.abs(theirs).max() > 1
    assert np.abs(ours - theirs).max() < TOLERANCE[form]


@needs_llama
@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {"rope_parameters": YARN},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"head_dim": 32},
    ],
    ids=["llama3", "linear", "yarn", "attention bias", "mlp bias", "head size"],
)  # fmt: skip
def test_variants_of_llama_have_torchs_logits(changes: dict[str, Any], tmp_path: Path) -> None:
    model, files = saved("llama", tmp_path / "hf", **changes)
    convert(files, tmp_path / "m.gguf", "f32", None)
    ids = np.random.default_rng(2).integers(6, 90, 100).tolist()
    assert np.abs(llama_logits(tmp_path / "m.gguf", ids) - torch_logits(model, ids)).max() < TOLERANCE["f32"]


def test_a_wide_row_gets_the_format_and_another_float16_as_llama_cpps_converter_does(tmp_path: Path) -> None:
    _, files = saved("qwen2", tmp_path / "hf", intermediate_size=112)
    convert(files, tmp_path / "m.gguf", "q8_0", None)
    forms = {name: t.form.name for name, t in Gguf.read(tmp_path / "m.gguf").tensors.items()}
    assert forms["blk.0.ffn_down.weight"] == "F16" and forms["blk.0.ffn_up.weight"] == "Q8_0"
    assert {forms["blk.1.attn_q.bias"], forms["output_norm.weight"]} == {"F32"}


def test_a_copy_of_a_tied_head_is_left_out(tmp_path: Path) -> None:
    _, files = saved("qwen2", tmp_path / "hf", tie_word_embeddings=False)
    convert(files, tmp_path / "own.gguf", "bf16", None)
    files.config["tie_word_embeddings"] = True
    convert(files, tmp_path / "tied.gguf", "bf16", None)
    own, tied = (set(Gguf.read(tmp_path / f"{name}.gguf").tensors) for name in ("own", "tied"))
    assert own - tied == {"output.weight"}


def test_llama_3s_rotary_factors_are_those_of_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = make_config("llama", rope_parameters=LLAMA3)
    frequency_D, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain_D = 1 / 50000.0 ** (torch.arange(0, 16, 2) / 16)
    factors_D = rope_factors(config.to_dict())
    assert len(set(np.round(factors_D, 3))) > 2  # unscaled, between and scaled
    assert torch.allclose(plain_D / torch.from_numpy(factors_D), frequency_D, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model_type": "gemma"}, "architecture 'gemma' is not written as GGUF"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 64}}, "beta_fast"),
        ({"hidden_act": "gelu"}, "'gelu' is not silu"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused_by_name(changes: dict[str, Any], why: str) -> None:
    config = make_config("llama").to_dict()
    config.pop("rope_parameters")
    with pytest.raises(InputError, match=why):
        metadata_of({**config, **changes}, "some")


def test_tensors_without_a_place_and_missing_ones_are_named() -> None:
    config = make_config("llama", tied=False).to_dict()
    values = {
        "model.embed_tokens.weight": Values((90, 64), lambda rows: np.zeros((90, 64), np.float32)[rows])
    }
    with pytest.raises(InputError, match=r"lacks lm_head\.weight"):
        tensors_of(config, values, "bf16")
    with pytest.raises(InputError, match=r"visual\.weight: no place in GGUF"):
        tensors_of(config, {**values, "visual.weight": values["model.embed_tokens.weight"]}, "bf16")


def test_numbers_beyond_float16_are_refused_and_not_made_infinite(tmp_path: Path) -> None:
    config = make_config("qwen2").to_dict()
    large = np.full((90, 64), 70000, np.float32)
    values = {"model.embed_tokens.weight": Values((90, 64), lambda rows: large[rows])}
    with pytest.raises(InputError, match="beyond float16's largest number; write bf16"):
        write_gguf(tmp_path / "m.gguf", config, values, "f16", name="some")
    assert list(tmp_path.iterdir()) == []
