"""What an update did: every number against a count by hand, every chance against real chance."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from frugal_rl import checkpoint
from frugal_rl.analysis import (
    ULP_LIMITS,
    History,
    analyse,
    gini,
    mean_spread,
    overlap,
    place_of,
    spread,
    top_share,
    ulp_label,
    ulps_between,
    values_of,
)
from frugal_rl.checkpoint import Checkpoint
from frugal_rl.errors import InputError
from frugal_rl.patch import BaseInfo, Patch, TensorPatch, WrongBase

ALL = np.arange(2**16, dtype="<u2")  # every bf16 and every fp16


@pytest.mark.parametrize(
    "name, layer, kind",
    [
        ("model.layers.3.mlp.up_proj.weight", 3, "up_proj"),
        ("model.layers.12.self_attn.q_proj.bias", 12, "q_proj.bias"),
        ("model.layers.0.input_layernorm.weight", 0, "input_layernorm"),
        ("model.embed_tokens.weight", None, "embed_tokens"),
        ("lm_head.weight", None, "lm_head"),
        ("transformer.h.7.attn.c_attn.weight", 7, "c_attn"),
    ],
)
def test_a_tensor_is_known_by_layer_and_kind(name: str, layer: int | None, kind: str) -> None:
    assert place_of(name) == (layer, kind)


@pytest.mark.parametrize("name, dtype", [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_values_are_those_of_torch_for_every_bit_pattern(name: str, dtype: torch.dtype) -> None:
    expected = torch.from_numpy(ALL.view("i2").copy()).view(dtype).double().numpy()
    assert np.array_equal(values_of(ALL, name), expected, equal_nan=True)


def test_an_integer_tensor_is_refused() -> None:
    with pytest.raises(InputError, match="I8"):
        values_of(np.zeros(3, "u1"), "I8")


def test_ulps_are_steps_through_all_numbers_in_order() -> None:
    finite = ALL[np.isfinite(values_of(ALL, "BF16"))]
    ordered = finite[np.argsort(values_of(finite, "BF16"), kind="stable")]
    value = values_of(ordered, "BF16")
    steps = ulps_between(ordered[:-1], ordered[1:])
    assert np.array_equal(steps, (value[1:] != value[:-1]).astype(float))  # 0 between -0 and +0, else 1
    assert ulps_between(ordered[:1], ordered[-1:])[0] == len(np.unique(value)) - 1


def test_classes_of_ulps_have_names_without_gaps() -> None:
    names = [ulp_label(i) for i in range(len(ULP_LIMITS))]
    assert names == [
        *("0", "1", "2", "3 to 4", "5 to 8", "9 to 16", "17 to 64", "65 to 256", "257 to 1,024"),
        "1,025 or more",
    ]


# --- a whole update


@pytest.fixture
def trained(tiny_folder: Path, tmp_path: Path) -> tuple[Checkpoint, Checkpoint, Patch]:
    """The embedded model, a copy with some entries changed, and their difference."""
    from safetensors.torch import load_file, save_file

    state = load_file(tiny_folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for number, (name, tensor) in enumerate(sorted(state.items())):
        if number % 3 == 2:
            continue  # a tensor without a change
        at = torch.rand(tensor.shape, generator=generator) < 0.02 * (1 + number % 3)
        moved = torch.randn(tensor.shape, generator=generator) * 10.0 ** torch.randint(-7, 0, tensor.shape)
        state[name] = torch.where(at, (tensor.float() + moved).to(tensor.dtype), tensor)
    folder = tmp_path / "trained"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text((tiny_folder / "config.json").read_text())
    return Checkpoint(tiny_folder), Checkpoint(folder), checkpoint.diff(tiny_folder, folder)


def test_counts_are_those_of_a_dense_comparison(trained: tuple[Checkpoint, Checkpoint, Patch]) -> None:
    base, after, patch = trained
    update = analyse(base, patch)
    assert [t.name for t in update.tensors] == list(base.tensors)
    for tensor in update.tensors:
        bits = base.bits(tensor.name), after.bits(tensor.name)
        values = [values_of(np.asarray(b), tensor.dtype) for b in bits]
        assert tensor.counts.entries == len(values[0])
        assert tensor.counts.changed_any == (bits[0] != bits[1]).sum()
        assert tensor.counts.changed_1e5 == (np.abs(values[1] - values[0]) > 1e-5).sum()
        assert sum(tensor.ulps) == tensor.counts.changed_any
    total = update.total
    assert 0 < total.changed_1e5 < total.changed_any < total.entries
    assert sum(update.ulps) == total.changed_any
    ranked = [t for t in update.tensors if t.rank is not None]
    name, rank = ranked[0].name, ranked[0].rank
    dense = [values_of(np.asarray(c.bits(name)), "BF16").reshape(ranked[0].shape) for c in (base, after)]
    assert rank is not None and rank.numerical == np.linalg.matrix_rank(
        (dense[1] - dense[0]).astype(np.float32)
    )


def test_groups_add_up_to_the_whole(trained: tuple[Checkpoint, Checkpoint, Patch]) -> None:
    update = analyse(trained[0], trained[2], ranks=False)
    for groups in (update.by(lambda t: t.kind), update.by(lambda t: t.layer)):
        assert sum(t.counts.changed_any for group in groups.values() for t in group) == (
            update.total.changed_any
        )
    assert all(t.rank is None for t in update.tensors)


def test_a_base_that_has_the_patch_applied_tells_the_same(
    trained: tuple[Checkpoint, Checkpoint, Patch],
) -> None:
    base, after, patch = trained
    assert analyse(base, patch).tensors == analyse(after, patch).tensors


def test_another_base_is_refused(
    trained: tuple[Checkpoint, Checkpoint, Patch], tiny_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    state = {k: v + 1 for k, v in load_file(tiny_folder / "model.safetensors").items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WrongBase):
        analyse(Checkpoint(tmp_path), trained[2])


def test_a_copy_of_a_tied_head_is_not_counted_twice(trained: tuple[Checkpoint, Checkpoint, Patch]) -> None:
    base, _, patch = trained
    name = next(iter(patch.tensors))
    update = analyse(base, patch, ranks=False, leave_out=frozenset({name}))
    assert update.total.changed_any == patch.entries - len(patch.tensors[name])


# --- concentration


def test_gini_is_half_the_mean_difference_over_the_mean() -> None:
    counts = np.random.default_rng(0).integers(0, 30, 41)
    differences = np.abs(counts[:, None] - counts[None, :]).mean()
    assert gini(counts) == pytest.approx(differences / (2 * counts.mean()))
    assert gini(np.full(9, 4)) == 0
    assert gini(np.array([0, 0, 0, 7])) == pytest.approx(1 - 1 / 4)


def test_the_top_percent_is_at_least_one() -> None:
    counts = np.arange(300)
    assert top_share(counts) == (297 + 298 + 299) / counts.sum()
    assert top_share(np.array([1, 3, 0])) == 3 / 4


@pytest.mark.parametrize("entries", [300, 3000, 60000])
def test_entries_placed_at_random_look_like_chance_and_those_in_columns_do_not(entries: int) -> None:
    """Chance is a mean of 16 draws; one draw of 400 columns differs from it by a few percent."""
    rng, rows, columns = np.random.default_rng(1), 200, 400
    placed = rng.choice(rows * columns, entries, replace=False) % columns
    measured = spread(np.bincount(placed, minlength=columns), rows)
    assert measured.gini == pytest.approx(measured.gini_chance, rel=0.1, abs=0.005)
    assert measured.top == pytest.approx(measured.top_chance, rel=0.35)
    gathered = spread(np.bincount(placed // 2, minlength=columns), rows * 2)
    assert gathered.gini > measured.gini + 0.1


def test_the_mean_weighs_tensors_by_their_changes(trained: tuple[Checkpoint, Checkpoint, Patch]) -> None:
    tensors = [t for t in analyse(trained[0], trained[2], ranks=False).tensors if t.columns is not None]
    whole = mean_spread(tensors, "columns")
    weights = [t.counts.changed_any for t in tensors]
    expected = np.average([t.columns.gini for t in tensors if t.columns], weights=weights)
    assert whole is not None and whole.gini == pytest.approx(expected)
    assert mean_spread([], "rows") is None


# --- overlap and steps


def tensor_at(positions: list[int], shape: tuple[int, ...] = (10, 20), up: int = 1) -> TensorPatch:
    at = np.array(sorted(positions))
    before = np.full(len(at), 0x3F80, "u2")
    return TensorPatch.from_bits("BF16", shape, at, before, before + np.uint16(up))


def test_overlap_is_that_of_sets() -> None:
    first = {"a": tensor_at([1, 2, 3]), "b": tensor_at([5, 6])}
    second = {"a": tensor_at([2, 3, 4, 9]), "c": tensor_at([5])}
    both = overlap(first, second)
    assert (both.first, both.second, both.common, both.same_way) == (5, 5, 2, None)
    assert both.jaccard == 2 / 8
    assert both.common_chance == 3 * 4 / 200
    shown = both.as_json()
    assert (shown["o1"], shown["o2"]) == (2 / 5, 2 / 5)
    assert overlap({}, {}).jaccard is None
    json.dumps(shown, allow_nan=False)


def test_chance_is_what_random_positions_have_in_common() -> None:
    """Mean of 300 draws: its standard error is below 2 % of the expected 20."""
    rng, shape = np.random.default_rng(0), (20, 50)
    found = [
        overlap(
            {"w": tensor_at(rng.choice(1000, 100, replace=False).tolist(), shape)},
            {"w": tensor_at(rng.choice(1000, 200, replace=False).tolist(), shape)},
        )
        for _ in range(300)
    ]
    assert found[0].common_chance == 20
    assert np.mean([f.common for f in found]) == pytest.approx(20, rel=0.06)


def test_updates_of_other_shapes_are_not_compared() -> None:
    with pytest.raises(InputError, match="one base"):
        overlap({"w": tensor_at([1])}, {"w": tensor_at([1], (20, 10))})


def test_the_way_entries_moved_is_that_of_their_values(
    trained: tuple[Checkpoint, Checkpoint, Patch],
) -> None:
    base, _, patch = trained
    same = overlap(patch.tensors, patch.tensors, base)
    assert same.same_way == same.common == patch.entries
    turned = {}
    for name, change in patch.tensors.items():
        before = base.touched_bits(name, change)
        minus = (change.applied(before) ^ np.uint16(0x8000)).astype(before.dtype)  # crosses zero
        turned[name] = TensorPatch.from_bits(change.dtype, change.shape, change.positions, before, minus)
    ways = 0
    for name, change in patch.tensors.items():
        before = values_of(base.touched_bits(name, change), change.dtype)
        after = values_of(change.applied(base.touched_bits(name, change)), change.dtype)
        ways += int((np.sign(after - before) == np.sign(-after - before)).sum())
    assert 0 < overlap(patch.tensors, turned, base).same_way == ways < patch.entries  # type: ignore[operator]


def test_history_counts_how_many_steps_touched_each_entry() -> None:
    rng = np.random.default_rng(3)
    steps = [
        {
            name: tensor_at(rng.choice(200, rng.integers(1, 60), replace=False).tolist())
            for name in ("a", "b")
            if rng.random() < 0.8
        }
        for _ in range(12)
    ]
    history, seen = History(), Counter[tuple[str, int]]()
    before: set[tuple[str, int]] = set()
    for tensors in steps:
        history.add(tensors)
        now = {(name, int(p)) for name, tensor in tensors.items() for p in tensor.positions}
        last = history.steps[-1]
        assert last.touched == len(now)
        assert last.fresh == len([p for p in now if p not in seen])
        if last.step > 1:
            assert last.previous is not None and last.previous.common == len(now & before)
        seen.update(now)
        before = now
    assert history.touched == len(seen)
    assert history.times() == [list(seen.values()).count(n) for n in range(1, 13)]
    assert history.persistence is not None
    assert history.persistence.common == sum(s.previous.common for s in history.steps if s.previous)


def test_one_step_has_no_persistence() -> None:
    history = History()
    history.add(Patch({"a": tensor_at([1])}, BaseInfo("base", {})).tensors)
    assert history.persistence is None
    assert history.times() == [1]
