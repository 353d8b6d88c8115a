"""The plan's arithmetic; its agreement with measured peaks is checked by the tools."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from frugal_rl import decoder, weights
from frugal_rl.errors import InputError
from frugal_rl.memory import (
    FORMS,
    HEAD_BLOCK_BYTES,
    PROPOSED,
    RESIDENT_BYTES,
    Plan,
    Shape,
    Work,
    lay_out,
    live_states,
    peak_resident_bytes,
    plan,
    table,
    what_would,
)

from .conftest import make_config, make_model, weights_of

QWEN_7B = {
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
QWEN_05B = {
    "num_hidden_layers": 24,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
GIB = 2**30


WORK = Work(
    sequences=64, prompt_tokens=256, response_tokens=768, storage_bytes=2, compute_bytes=2, has_host=True
)


def make_plan(budget_gib: float = 24, shape: Shape | None = None, **changes: Any) -> Plan:
    return plan(shape or Shape.from_config(QWEN_7B), replace(WORK, **changes), int(budget_gib * GIB))


def test_int8_weights_take_a_byte_an_entry_and_a_layer_in_the_compute_format() -> None:
    low, whole = make_plan(form="int8"), make_plan()
    shape = Shape.from_config(QWEN_7B)
    assert low.learning["weights"] == shape.parameters + 4 * shape.rows
    assert low.learning["weights"] < 0.51 * whole.learning["weights"]
    assert low.learning["layer copies"] == 2 * shape.layer_parameters
    assert low.budget_bytes == whole.budget_bytes
    assert whole.boundary_on_host and not low.boundary_on_host  # the states fit in the place of the weights


def test_parameters_of_a_known_model() -> None:
    # the model card says 7.62 G; norms and biases are left out
    assert Shape.from_config(QWEN_7B).parameters == pytest.approx(7.616e9, rel=1e-3)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(kind: str, tied: bool) -> None:
    config = make_config(kind, tied=tied)
    counted = Shape.from_config(config.to_dict()).parameters
    assert weights_of(make_model(config)).parameters == pytest.approx(counted, rel=0.02)


def test_both_phases_stay_within_the_budget() -> None:
    found = make_plan()
    assert found.generating_bytes <= found.budget_bytes
    assert found.learning_bytes <= found.budget_bytes
    assert 1 <= found.slots <= 64
    assert found.micro_tokens >= 1024


def test_more_memory_never_gives_fewer_slots_or_smaller_micro_batches() -> None:
    plans = [make_plan(b) for b in (22, 24, 32, 80)]
    assert [p.slots for p in plans] == sorted(p.slots for p in plans)
    on_host = [p for p in plans if p.boundary_on_host]
    assert len(on_host) >= 2
    assert [p.micro_tokens for p in on_host] == sorted(p.micro_tokens for p in on_host)


def test_boundary_states_go_to_the_host_only_when_they_must_and_can() -> None:
    # 29 states of 64 sequences x 1024 tokens x 3584 x 2 bytes are 12.7 GiB, the weights 14.2 GiB
    assert make_plan().boundary_on_host
    assert not make_plan(40).boundary_on_host
    assert not make_plan(has_host=False).boundary_on_host
    with pytest.raises(InputError):
        make_plan(19, has_host=False)


def test_live_states_are_fewest_near_the_root_of_the_layers() -> None:
    assert [live_states(24, k) for k in (1, 2, 3, 4, 5, 6, 24, 30)] == [25, 14, 11, 10, 9, 10, 25, 25]
    assert [live_states(28, k) for k in (1, 4, 5, 6, 7)] == [29, 11, 10, 10, 11]


def on_cpu(budget_mib: float) -> Plan:
    """Qwen2.5-0.5B in bf16, 16 sequences of 512 tokens in float32."""
    work = Work(16, 128, 384, storage_bytes=2, compute_bytes=4, has_host=False)
    return plan(Shape.from_config(QWEN_05B), work, int(budget_mib * 2**20))


def test_a_cpu_keeps_every_boundary_then_goes_backward_together_then_computes_the_fewest_anew() -> None:
    state = 16 * 512 * 896 * 4
    assert on_cpu(8192).boundary_every == on_cpu(8192).layers_together == 1
    assert on_cpu(8192).learning["boundary states"] == 25 * state
    seen = {}
    for budget_mib in range(2400, 1400, -4):
        try:
            found = on_cpu(budget_mib)
        except InputError:
            break
        assert found.peak_bytes <= budget_mib * 2**20
        way = found.boundary_every, found.layers_together
        assert found.learning["boundary states"] == live_states(24, *way) * state
        seen[way] = budget_mib
    assert list(seen) == [(1, 1), (2, 2), (2, 1), (3, 1), (4, 1), (5, 1)]
    # with less the next way is taken, and not before
    fixed = on_cpu(8192).least_bytes - 9 * state
    for (every, together), budget_mib in seen.items():
        if together == 1 and every < 5:
            assert fixed + live_states(24, every) * state <= budget_mib * 2**20
            assert fixed + live_states(24, every) * state > (budget_mib - 4) * 2**20


def test_layers_that_go_backward_together_are_counted_each() -> None:
    two, one = on_cpu(1900), on_cpu(1700)
    assert (two.layers_together, one.layers_together) == (2, 1)
    layer = Shape.from_config(QWEN_05B).layer_parameters * 4
    assert two.learning["layer copies"] - one.learning["layer copies"] == layer
    assert two.learning["gradient scratch"] - one.learning["gradient scratch"] == layer
    # of a row as wide as the micro-batch: as bits once, as numbers in each
    masks = [1024 * (1 + 4 * p.layers_together) for p in (two, one)]
    per_token = [
        p.learning["micro-batch"] / p.micro_tokens - m for p, m in zip((two, one), masks, strict=True)
    ]
    assert per_token[0] == 2 * per_token[1]
    assert two.generating["layer copies"] == two.learning["layer copies"]  # they share their scratch


def test_a_host_without_room_keeps_every_kth_or_none() -> None:
    states = 29 * 64 * 1024 * 3584 * 2
    assert make_plan().host["boundary states"] == 2 * states  # page-locked
    whole = make_plan(host_room_bytes=2 * states)
    assert (whole.boundary_on_host, whole.boundary_every) == (True, 1)
    less = make_plan(host_room_bytes=2 * states - 1)
    assert (less.boundary_on_host, less.boundary_every, less.layers_together) == (True, 2, 2)
    assert less.host["boundary states"] < 2 * states
    none = make_plan(28, host_room_bytes=GIB)
    assert (none.boundary_on_host, none.host["boundary states"]) == (False, 0)
    assert none.boundary_every > 1
    assert none.learning_bytes <= 28 * GIB
    with pytest.raises(InputError):
        make_plan(18, host_room_bytes=GIB)


def test_a_checkpoint_on_the_host_takes_of_its_room() -> None:
    room = 60 * GIB
    alone = make_plan(18, form="host", host_room_bytes=room)
    assert alone.boundary_on_host
    assert alone.host_bytes <= room
    less = make_plan(18, form="host", host_room_bytes=alone.host_bytes - 1)
    assert less.boundary_every > alone.boundary_every
    assert less.host_bytes < alone.host_bytes


def test_what_does_not_fit_is_refused_with_the_figure_that_would() -> None:
    with pytest.raises(InputError, match=r"need \d+\.\d GiB, the budget is 12\.0 GiB"):
        make_plan(12)


@pytest.mark.skipif(sys.platform != "linux", reason="is glibc's habit")
@pytest.mark.parametrize("call,kept_mib", [("return_large_blocks()", 0), ("", 16)])
def test_large_blocks_go_back_to_the_system(call: str, kept_mib: int) -> None:
    code = f"""if True:
        from frugal_rl.memory import return_large_blocks
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
        {call}
        block = b"x" * (24 << 20)
        del block  # now glibc keeps blocks of up to 24 MiB
        block = b"x" * (16 << 20)
        above = b"x" * (6 << 20)  # what a step holds on to
        full = resident()
        del block
        print(16 - full + resident())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert abs(int(done.stdout) - kept_mib) <= 1


def test_the_peak_covers_what_this_process_holds() -> None:
    before = peak_resident_bytes()
    block = b"x" * (64 << 20)
    assert peak_resident_bytes() >= max(before, len(block))


def test_the_constants_are_those_of_the_decoder() -> None:
    assert RESIDENT_BYTES == decoder.RESIDENT_BYTES
    assert HEAD_BLOCK_BYTES == decoder.HEAD_BLOCK_BYTES
    assert PROPOSED == weights.PROPOSED


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compute_bytes", [2, 4])
def test_sums_are_those_of_the_parts_and_of_the_choices(form: str, compute_bytes: int) -> None:
    found = make_plan(30, form=form, compute_bytes=compute_bytes, has_host=True)
    made = found.as_json()
    for phase in ("generating", "learning", "host"):
        assert made[f"{phase}_bytes"] == sum(made[phase].values())
    assert found.peak_bytes == max(found.generating_bytes, found.learning_bytes) <= found.budget_bytes
    # 2 x 28 layers x 4 KV heads x 128 entries for each of 1024 tokens of each slot
    assert found.generating["KV pool"] == 2 * 28 * 4 * 128 * 1024 * compute_bytes * found.slots


def test_int8_is_a_byte_an_entry_and_a_scale_a_row_and_host_adds_the_checkpoint_outside() -> None:
    shape = Shape.from_config(QWEN_7B)
    rows = 28 * (3584 + 2 * 512 + 3584 + 2 * 18944 + 3584) + 2 * 152064
    for form in ("int8", "host"):
        found = make_plan(form=form)
        assert found.learning["weights"] == found.generating["weights"] == shape.parameters + 4 * rows
        assert found.host["weights"] == (2 * shape.parameters if form == "host" else 0)
    copy = 2 * shape.layer_parameters
    assert [make_plan(form=f).learning["layer copies"] for f in FORMS] == [0, copy, 2 * copy]


def test_the_least_budget_fits_and_a_byte_less_does_not() -> None:
    for changes in (
        {},
        {"form": "int8"},
        {"has_host": False},
        {"compute_bytes": 4, "form": "host"},
        {"host_room_bytes": GIB},
    ):
        work = replace(WORK, **changes)
        shape = Shape.from_config(QWEN_7B)
        least = lay_out(shape, work, 1).least_bytes
        assert lay_out(shape, work, 200 * GIB).least_bytes == least
        assert plan(shape, work, least).peak_bytes <= least
        with pytest.raises(InputError):
            plan(shape, work, least - 1)


def test_more_work_never_needs_less() -> None:
    shape = Shape.from_config(QWEN_7B)
    for field in ("sequences", "prompt_tokens", "response_tokens"):
        least = [lay_out(shape, replace(WORK, **{field: n}), GIB).least_bytes for n in (1, 10, 100, 4000)]
        assert least == sorted(least)
        assert least[0] < least[-1]


def test_what_would_fit_does_and_one_more_does_not() -> None:
    shape, budget, work = Shape.from_config(QWEN_7B), 19 * GIB, replace(WORK, has_host=False)
    advice = what_would(shape, work, budget)
    found = re.match(r"(\d+) sequences of 1024 tokens or 64 sequences with max_tokens = (\d+) would", advice)
    assert found is not None, advice
    for field, most in (("sequences", int(found[1])), ("response_tokens", int(found[2]))):
        assert lay_out(shape, replace(work, **{field: most}), budget).fits
        assert not lay_out(shape, replace(work, **{field: most + 1}), budget).fits
    assert "smaller model" in what_would(shape, WORK, 10 * GIB)


def test_the_table_names_every_part_and_says_what_does_not_fit() -> None:
    shape = Shape.from_config(QWEN_7B)
    plans = {form: lay_out(shape, replace(WORK, form=form), 14 * GIB) for form in FORMS}
    lines = table(plans).splitlines()
    assert lines[0].split() == ["bf16", "int8", "host"]
    for part in ("weights", "layer copies", "KV pool", "logits", "prefill", "boundary states", "head"):
        assert any(line.startswith(f"  {part}") for line in lines), part
    verdict = next(line for line in lines if "fit" in line)
    assert re.split(r"  +", verdict.strip()) == ["does not fit", "fits", "fits"]


def test_on_a_gpu_decode_steps_have_memory_of_their_own() -> None:
    found = make_plan(eviction="h2o", kv_entries=640)
    token = (5 * 3584 + (4 * 28 + 3 * 4) * 128 + 6 * 18944) * 2 + 4 * 3584 * 4
    assert found.generating["decode graphs"] == (32 << 20) + found.slots * token
    assert found.generating["logits"] == found.slots * 3 * 4 * 152064
    assert "decode graphs" not in make_plan(64, has_host=False).generating
    assert "decode graphs" not in make_plan(shape=Shape.from_config(QWEN_05B), gguf="q8_0").generating


def test_llama_cpps_copy_takes_memory_in_both_phases_and_its_cache_while_generating() -> None:
    shape = Shape.from_config(QWEN_05B)
    own, copied = make_plan(shape=shape), make_plan(shape=shape, gguf="q8_0")
    copy = shape.parameters * 34 // 32  # 32 entries in 34 bytes
    assert copied.generating["llama.cpp's weights"] == copied.learning["llama.cpp's weights"] == copy
    assert make_plan(shape=shape, gguf="bf16").learning["llama.cpp's weights"] == 2 * shape.parameters
    stream = 2 * 24 * 2 * 64 * 1024 * 2  # keys and values of 1024 cells in float16
    assert copied.generating["KV pool"] == copied.slots * stream
    assert copied.generating["llama.cpp's spare stream"] == stream
    assert copied.learning_bytes == own.learning_bytes + copy
    assert copied.least_bytes > own.least_bytes


def test_llama_cpp_fills_up_its_cells_and_has_256_streams_one_of_them_spare() -> None:
    shape = Shape.from_config(QWEN_05B)
    longer = make_plan(64, shape, gguf="q8_0", sequences=1000, prompt_tokens=1, response_tokens=256)
    assert longer.slots == 255
    assert longer.generating["llama.cpp's spare stream"] == 2 * 24 * 2 * 64 * 512 * 2  # 257 become 512
