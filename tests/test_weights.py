"""Propose and commit against a dense update; the overlay against kept copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from frugal_rl.errors import FrugalError
from frugal_rl.patch import AlreadyApplied, BaseInfo, WrongBase
from frugal_rl.storage import Quantised
from frugal_rl.weights import Transaction, Weights, bits_of

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make_weights(dtype: torch.dtype, seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (37, 11), "b": (5,), "c": (64, 100)}
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.02).to(dtype) for name, shape in shapes.items()
    }
    info = BaseInfo("made here", dict.fromkeys(shapes, "00" * 16))
    return Weights(tensors, base=info)


def make_gradients(seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (37, 11), "b": (5,), "c": (64, 100)}
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def dense_update(weights: dict[str, Tensor], gradients: dict[str, Tensor], lr: float, clip: float) -> tuple:
    """The slow twin: the whole gradient, its norm, and every entry rounded."""
    norm = torch.sqrt(sum(g.double().square().sum() for g in gradients.values()))
    scale = min(1.0, clip / (float(norm) + 1e-6))
    new = {
        k: (w.float() - torch.tensor(lr * scale).float() * gradients[k]).to(w.dtype)
        for k, w in weights.items()
    }
    return new, float(norm), scale


def commit(weights: Weights, gradients: dict[str, Tensor], lr: float, clip: float | None):
    transaction = Transaction(weights, lr, clip)
    for name, gradient in gradients.items():
        transaction.propose(name, gradient)
    return transaction.commit()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [1e9, 3.0, 0.01])
@pytest.mark.parametrize("lr", [0.1, 1e-3, 1e-5])
def test_commit_is_the_dense_update_with_global_clipping(dtype: torch.dtype, clip: float, lr: float) -> None:
    weights, gradients = make_weights(dtype), make_gradients()
    expected, norm, scale = dense_update(weights.tensors, gradients, lr, clip)
    before = {k: v.clone() for k, v in weights.tensors.items()}
    result = commit(weights, gradients, lr, clip)
    assert result.norm == pytest.approx(norm, rel=1e-6)
    assert result.scale == pytest.approx(scale, rel=1e-6)
    for name, tensor in weights.tensors.items():
        # the scale differs in the last float32 digit, which may decide a tie
        different = tensor != expected[name]
        assert int(different.sum()) <= (2 if dtype != torch.float32 else tensor.numel())
        torch.testing.assert_close(tensor.float(), expected[name].float(), rtol=1e-2, atol=1e-6)
        changed = result.changed.get(name)
        positions = changed.position_N if changed else torch.zeros(0, dtype=torch.long)
        assert torch.equal(positions, torch.nonzero((tensor != before[name]).view(-1)).view(-1))
        if changed:
            assert torch.equal(changed.before_bits_N, bits_of(before[name])[positions])
            assert torch.equal(changed.after_bits_N, bits_of(tensor)[positions])


def test_the_order_of_proposals_and_their_cut_into_rows_change_nothing() -> None:
    gradients = make_gradients()
    whole, pieces = make_weights(torch.bfloat16), make_weights(torch.bfloat16)
    commit(whole, gradients, 0.05, 1.0)
    transaction = Transaction(pieces, 0.05, 1.0)
    odd = torch.arange(1, 64, 2)
    even = torch.arange(0, 64, 2)
    transaction.propose("c", gradients["c"][odd], row_R=odd)
    transaction.propose("a", gradients["a"][20:], first_row=20)
    transaction.propose("b", gradients["b"])
    transaction.propose("c", gradients["c"][even], row_R=even)
    transaction.propose("a", gradients["a"][:20])
    transaction.commit()
    for name in gradients:
        assert torch.equal(whole.tensors[name], pieces.tensors[name])
    for name, overlay in whole.overlay.items():
        assert torch.equal(overlay.position_N, pieces.overlay[name].position_N)


def test_nothing_changes_before_commit() -> None:
    weights, gradients = make_weights(torch.bfloat16), make_gradients()
    before = {k: v.clone() for k, v in weights.tensors.items()}
    Transaction(weights, 1.0, None).propose("c", gradients["c"])
    assert all(torch.equal(before[k], v) for k, v in weights.tensors.items())
    assert not weights.overlay


def test_a_norm_that_is_not_finite_commits_nothing() -> None:
    weights, gradients = make_weights(torch.bfloat16), make_gradients()
    before = {k: v.clone() for k, v in weights.tensors.items()}
    gradients["a"][3, 3] = float("nan")
    result = commit(weights, gradients, 0.1, 1.0)
    assert result.dropped is not None and not result.changed
    assert all(torch.equal(before[k], v) for k, v in weights.tensors.items())


def test_an_update_below_half_a_unit_in_the_last_place_changes_nothing() -> None:
    weights = Weights({"a": torch.tensor([1.0, 0.5], dtype=torch.bfloat16)})
    unit = 2.0**-8  # from 1 up to its neighbour is 2**-7, down to it 2**-8
    result = commit(weights, {"a": torch.tensor([unit * 0.49, unit * 0.49])}, 1.0, None)
    # 1 -> below 1 the spacing is 2**-8, half of it 2**-9: 0.49 * 2**-8 is just below that
    assert result.entries == 1  # 0.5 has half the spacing: there it is enough
    assert weights.tensors["a"].tolist() == [1.0, 0.498046875]


def test_base_takes_the_patch_off_and_puts_it_back() -> None:
    weights = make_weights(torch.bfloat16)
    base = {k: v.clone() for k, v in weights.tensors.items()}
    for seed in range(4):
        commit(weights, make_gradients(seed), 0.01, 1.0)
    after = {k: v.clone() for k, v in weights.tensors.items()}
    with weights.base():
        assert all(torch.equal(bits_of(base[k]), bits_of(v)) for k, v in weights.tensors.items())
    assert all(torch.equal(bits_of(after[k]), bits_of(v)) for k, v in weights.tensors.items())
    with pytest.raises(RuntimeError), weights.base():
        raise RuntimeError
    assert all(torch.equal(bits_of(after[k]), bits_of(v)) for k, v in weights.tensors.items())


def test_the_overlay_is_sorted_and_holds_the_first_bits_of_each_entry() -> None:
    weights = make_weights(torch.bfloat16)
    base = {k: v.clone() for k, v in weights.tensors.items()}
    touched: dict[str, set[int]] = {k: set() for k in base}
    for seed in range(5):
        for name, changed in commit(weights, make_gradients(seed), 0.003, 1.0).changed.items():
            touched[name] |= set(changed.position_N.tolist())
    for name, overlay in weights.overlay.items():
        assert overlay.position_N.tolist() == sorted(touched[name])
        assert torch.equal(overlay.bits_N, bits_of(base[name])[overlay.position_N])


def test_the_patch_leads_from_the_base_to_the_policy() -> None:
    weights = make_weights(torch.bfloat16)
    for seed in range(3):
        commit(weights, make_gradients(seed), 0.01, 1.0)
    fresh = make_weights(torch.bfloat16)
    fresh.write_patch_(weights.patch({}))
    for name, tensor in weights.tensors.items():
        assert torch.equal(bits_of(tensor), bits_of(fresh.tensors[name]))
    assert fresh.changed_counts() == weights.changed_counts()


def test_changed_counts_are_against_the_base_by_both_rules() -> None:
    weights = make_weights(torch.bfloat16)
    base = {k: v.clone() for k, v in weights.tensors.items()}
    for seed in range(3):
        commit(weights, make_gradients(seed), 0.001, 1.0)
    any_bit, moved = weights.changed_counts()
    assert any_bit == sum(int((base[k] != v).sum()) for k, v in weights.tensors.items())
    assert moved == sum(
        int(((base[k].double() - v.double()).abs() > 1e-5).sum()) for k, v in weights.tensors.items()
    )
    assert 0 < moved < any_bit


def test_a_patch_for_other_weights_is_refused_before_anything_is_written() -> None:
    weights = make_weights(torch.bfloat16)
    commit(weights, make_gradients(), 0.05, 1.0)
    patch = weights.patch({})
    with pytest.raises(AlreadyApplied):
        weights.write_patch_(patch)
    other = make_weights(torch.bfloat16, seed=9)
    before = {k: v.clone() for k, v in other.tensors.items()}
    with pytest.raises(WrongBase, match="made here"):
        other.write_patch_(patch)
    assert all(torch.equal(before[k], v) for k, v in other.tensors.items())
    with pytest.raises(WrongBase, match="does not have"):
        Weights({"z": torch.zeros(3, dtype=torch.bfloat16)}).write_patch_(patch)
    with pytest.raises(WrongBase, match="F16"):
        make_weights(torch.float16).write_patch_(patch)


def test_proposals_stay_small_when_the_norm_is_far_above_the_clip() -> None:
    weights = make_weights(torch.bfloat16)
    huge = {k: g * 1e4 for k, g in make_gradients().items()}
    transaction = Transaction(weights, 1e-3, 1.0)
    for name in ("c", "a", "b"):
        transaction.propose(name, huge[name])
    kept = sum(len(p) for chunks in transaction._proposed.values() for p, *_ in chunks)
    changed = transaction.commit().entries
    assert kept <= changed * 1.2 + 10  # at scale 1 every one of the 6812 entries would have been kept
    assert 0 < changed < 3000


def test_a_gradient_of_zero_changes_no_bit_not_even_the_sign_of_a_zero() -> None:
    weights = Weights({"a": torch.full((4,), -0.0)})
    result = commit(weights, {"a": torch.tensor([0.0, -0.0, -0.0, 0.0])}, 0.1, 1.0)
    assert (result.norm, result.scale, result.changed, result.dropped) == (0.0, 1.0, {}, None)
    assert torch.signbit(weights.tensors["a"]).all()


def test_negative_zero_and_zero_are_different_bits() -> None:
    weights = Weights({"a": torch.tensor([-0.0, 0.0], dtype=torch.bfloat16)}, base=BaseInfo("z", {}))
    result = commit(weights, {"a": torch.tensor([0.0, 0.0])}, 1.0, None)
    # float32(-0.0) - 0.0 is -0.0: nothing moves
    assert result.entries == 0
    assert np.signbit(weights.tensors["a"].float().numpy()).tolist() == [True, False]


def test_a_step_that_is_written_half_way_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An out-of-memory would be taken for one of the step's: done again, on half-changed weights."""
    weights = make_weights(torch.bfloat16)

    def short(entries: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(weights.held["c"], "write_", short)
    with pytest.raises(FrugalError, match=r"part of a step only.*2\.00 GiB.*--resume"):
        commit(weights, make_gradients(), 0.1, None)


@pytest.mark.parametrize("whole", [True, False])
def test_memory_that_runs_out_while_the_patch_is_taken_off_does_not_lose_it(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_weights(torch.bfloat16)
    weights = made if whole else Weights({n: Quantised.of(t) for n, t in made.tensors.items() if t.ndim == 2})
    commit(weights, {n: g for n, g in make_gradients().items() if n in weights.held}, 0.1, None)
    policy = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    counts = weights.changed_counts()

    def short() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(weights.held["c"], "take_off_", short)
    with pytest.raises(torch.OutOfMemoryError), weights.base():
        raise AssertionError("not reached")
    assert all(torch.equal(tensor, policy[name]) for name, tensor in weights.tensors.items())
    assert weights.changed_counts() == counts > (100, 0)
