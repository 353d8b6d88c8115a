"""The int8 form against a dense twin: its numbers, its update rule, and the laws of test_weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from frugal_rl import checkpoint, storage
from frugal_rl.decoder import Decoder, parameter_names
from frugal_rl.generate.engine import Engine
from frugal_rl.learn import Learner
from frugal_rl.patch import AlreadyApplied, BaseInfo, WrongBase
from frugal_rl.rollout import Request
from frugal_rl.storage import Changed, Quantised, bits_of
from frugal_rl.weights import Transaction, Weights, export

from .conftest import KINDS, VOCABULARY, make_config, make_model, make_rollouts, save_folder, weights_of

SHAPES = {"a": (37, 11), "b": (5,), "c": (64, 100)}
INFO = BaseInfo("made here (int8)", {})


def make_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {k: (torch.randn(s, generator=generator) * 0.02).bfloat16() for k, s in SHAPES.items()}
    for name in ("a", "c"):  # neighbouring rows with steps far apart
        tensors[name] *= 8.0 ** (torch.arange(len(tensors[name]))[:, None] % 3 - 1)
    tensors["a"][3] = 0  # a row of zeros
    return tensors


def quantised(tensors: dict[str, Tensor], **options: object) -> Weights:
    held = {k: Quantised.of(t) if t.ndim == 2 else t.clone() for k, t in tensors.items()}
    return Weights(held, base=INFO, **options)  # type: ignore[arg-type]


def make_gradients(seed: int = 1, size: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * size for name, shape in SHAPES.items()}


def commit(weights: Weights, gradients: dict[str, Tensor], lr: float, clip: float | None):
    transaction = Transaction(weights, lr, clip)
    for name, gradient in gradients.items():
        transaction.propose(name, gradient)
    return transaction.commit()


def slow_base(weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, steps and values, an entry at a time."""
    code = torch.zeros(weight_OI.shape, dtype=torch.int64)
    value = torch.zeros(weight_OI.shape, dtype=torch.bfloat16)
    step = torch.zeros(len(weight_OI))
    for o, row in enumerate(weight_OI.float()):
        absmax = row.abs().max()
        step[o] = absmax * torch.tensor(1 / 127)
        for i, w in enumerate(row):
            code[o, i] = int(torch.round(w * (127.0 / absmax))) if absmax else 0
            value[o, i] = ((code[o, i] * absmax) * torch.tensor(1 / 127)).bfloat16()
    return code, step, value


def slow_update(now: Tensor, code: Tensor, step: Tensor, gradient: Tensor, scale: Tensor) -> Tensor:
    """The stated rule, an entry at a time in Python's exact arithmetic after the float32 difference."""
    exact = now.float() - scale * gradient
    after = exact.bfloat16()
    for o, i in torch.nonzero((code == 0) & (step[:, None] > 0)).tolist():
        x, quarter = float(exact[o, i]), float(step[o]) / 4
        exponent = 0
        while 2.0**exponent > quarter:
            exponent -= 1
        unit = 2.0 ** (exponent - 7)
        if abs(x) < 128 * unit:
            after[o, i] = round(x / unit) * unit  # Python rounds half to even; int 0 has no sign
    return after


def test_the_quantiser_is_that_of_bitsandbytes_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    monkeypatch.setattr(storage, "BLOCK", 1000)  # several blocks, the last one short
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weight_OI = torch.randn(301, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
        held = Quantised.of(weight_OI)
        code_OI, absmax_O, _ = functional.int8_vectorwise_quant(weight_OI.clone())
        assert torch.equal(held.code_OI, code_OI)
        assert torch.equal(held.absmax_O, absmax_O)
        expected = functional.int8_vectorwise_dequant(code_OI, absmax_O).bfloat16()
        assert torch.equal(held.rows(slice(0, 301), torch.bfloat16), expected)


@pytest.mark.parametrize("block", [storage.BLOCK, 250, 1])
def test_codes_and_values_are_those_of_the_formula(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BLOCK", block)  # all rows, a few, less than one: a row is never cut
    for weight in (make_tensors()["a"], make_tensors()["c"]):
        held = Quantised.of(weight)
        code, _, value = slow_base(weight)
        assert torch.equal(held.code_OI.long(), code)
        assert torch.equal(bits_of(held.rows(slice(0, len(weight)), torch.bfloat16)), bits_of(value))
        half = held.absmax_O[:, None] / 254 + weight.float().abs() * 2**-8
        assert bool(((value.float() - weight.float()).abs() <= half).all())
    assert held.nbytes == 64 * 100 + 64 * 4


@pytest.mark.parametrize("clip", [1e9, 3.0, 0.01])
@pytest.mark.parametrize("lr", [0.1, 1e-3, 1e-5])
def test_steps_are_those_of_a_dense_twin_under_the_stated_rule(lr: float, clip: float) -> None:
    tensors = make_tensors()
    weights = quantised(tensors)
    parts = {k: slow_base(t) for k, t in tensors.items() if t.ndim == 2}
    twin = {k: parts[k][2] if k in parts else t for k, t in tensors.items()}
    for seed in range(4):
        gradients = make_gradients(seed)
        before = {k: t.clone() for k, t in twin.items()}
        result = commit(weights, gradients, lr, clip)
        scale = torch.tensor(lr) * torch.tensor(result.scale)
        for name, now in twin.items():
            if name in parts:
                code, step, _ = parts[name]
                twin[name] = slow_update(now, code, step, gradients[name], scale)
            else:
                twin[name] = (now.float() - scale * gradients[name]).bfloat16()
        policy = weights.tensors
        for name, expected in twin.items():
            # the twin's step is lr * c rounded twice: a tie may fall otherwise, and is then taken over
            differs = bits_of(policy[name]) != bits_of(expected)
            assert int(differs.sum()) <= 1
            twin[name] = policy[name].clone()
            moved = torch.nonzero(bits_of(policy[name]) != bits_of(before[name])).view(-1)
            changed = result.changed.get(name)
            assert (changed.position_N.tolist() if changed else []) == moved.tolist()
            if changed:
                assert torch.equal(changed.before_bits_N, bits_of(before[name])[moved])
                assert torch.equal(changed.after_bits_N, bits_of(policy[name])[moved])


def test_an_entry_of_code_0_moves_by_units_of_a_quarter_step_and_only_so_far() -> None:
    weight = torch.tensor([[1.27, 0.0, 0.0, 0.0, 0.0, 0.0, -0.2]])  # step 0.01, a quarter of it 0.0025
    unit = 2.0**-9 * 2.0**-7  # 2**-9 is the power of 2 below 0.0025
    weights = Weights({"w": Quantised.of(weight)}, base=INFO)
    gradient = torch.tensor([[0.0, 0.49 * unit, -0.49 * unit, -0.51 * unit, 3.4 * unit, -300.7 * unit, 0.0]])
    result = commit(weights, {"w": gradient}, 1.0, None)
    # above 128 units the spacing of bf16 itself is coarser: 2 units from 256 on
    values = weights.tensors["w"][0]
    assert (values[1:6].float() / unit).tolist() == [0.0, 0.0, 1.0, -3.0, 300.0]
    assert result.changed["w"].position_N.tolist() == [3, 4, 5]
    # back to 0: no difference to the base is left, not even in the sign
    commit(weights, {"w": torch.tensor([[0.0, 0.0, 0.0, 1.2 * unit, 0.0, 0.0, 0.0]])}, 1.0, None)
    assert weights.changed_counts()[0] == 2


def test_a_tiny_update_changes_next_to_none_of_the_entries_of_code_0() -> None:
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.02
    weights = Weights({"w": Quantised.of(weight)}, base=INFO)
    zeros = int((weights.held["w"].code_OI == 0).sum())  # type: ignore[union-attr]
    gradient = torch.randn(200, 300, generator=torch.Generator().manual_seed(1))
    assert zeros > 500
    unit = float(weights.held["w"]._units(torch.tensor([0])))  # type: ignore[union-attr]
    changed = commit(weights, {"w": gradient}, unit / 20, None).changed
    assert not changed  # bf16's grid would have moved every one of them


def test_what_is_proposed_is_what_changes_when_nothing_is_clipped() -> None:
    weights, gradients = quantised(make_tensors()), make_gradients()
    for lr in (0.01, 1e-4, 1e-6):
        transaction = Transaction(weights, lr, None)
        rows = torch.arange(31, -1, -2)
        transaction.propose("c", gradients["c"][rows], row_R=rows)
        transaction.propose("c", gradients["c"][33:], first_row=33)  # not the half, nor a multiple of 3
        kept = sum(len(p) for chunks in transaction._proposed.values() for p, *_ in chunks)
        assert transaction.commit().entries == kept > 0


def test_the_order_of_proposals_and_their_cut_into_rows_change_nothing() -> None:
    whole, pieces = quantised(make_tensors()), quantised(make_tensors())
    for seed in range(3):
        gradients = make_gradients(seed)
        commit(whole, gradients, 0.05, 1.0)
        transaction = Transaction(pieces, 0.05, 1.0)
        odd, even = torch.arange(1, 64, 2), torch.arange(0, 64, 2)
        transaction.propose("c", gradients["c"][odd], row_R=odd)
        transaction.propose("a", gradients["a"][19:], first_row=19)
        transaction.propose("b", gradients["b"])
        transaction.propose("c", gradients["c"][even], row_R=even)
        transaction.propose("a", gradients["a"][:19])
        transaction.commit()
    for name in gradients:
        assert torch.equal(bits_of(whole.tensors[name]), bits_of(pieces.tensors[name]))
        assert torch.equal(whole.overlay[name].position_N, pieces.overlay[name].position_N)
        assert torch.equal(whole.overlay[name].bits_N, pieces.overlay[name].bits_N)


def test_rows_lookup_load_and_entries_read_the_same_policy() -> None:
    weights = quantised(make_tensors())
    for seed in range(3):
        commit(weights, make_gradients(seed), 0.003, 1.0)
    for name in ("a", "c"):
        dense = weights.tensors[name].float()
        assert len(weights.overlay[name])
        assert torch.equal(weights.load(name), dense)
        assert torch.equal(weights.load(name, torch.full((9999,), 7.0)), dense)
        assert torch.equal(weights.rows(name, 5, 31), dense[5:31])
        index_BT = torch.tensor([[3, 0, 3], [36, 20, 7]])
        assert torch.equal(weights.lookup(name, index_BT), dense[index_BT])
        position_N = torch.randint(0, dense.numel(), (200,), generator=torch.Generator().manual_seed(0))
        assert torch.equal(weights.held[name].at(position_N).float(), dense.view(-1)[position_N])


@pytest.mark.parametrize("laid", [1, 50, storage.LAID])
def test_rows_with_any_number_of_changed_entries_are_those_of_the_dense_twin(
    laid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "LAID", laid)
    held = Quantised.of(make_tensors()["c"])
    rows = torch.tensor([[63, 0, 7], [5, 63, 7], [40, 41, 0]])
    mask = torch.zeros(held.shape, dtype=torch.bool)
    for changes in ([(7, slice(0, 100))], [(63, slice(99, 100)), (0, slice(0, 3))], [(41, slice(50, 52))]):
        for row, columns in changes:  # a whole row, both ends, one amid empty ones
            mask[row, columns] = True
        position_N = torch.nonzero(mask.view(-1)).view(-1)
        before_N = held.at(position_N)
        held.write_(Changed(position_N, bits_of(before_N), bits_of(before_N + 1.0)))
        dense = held.copy_to_(torch.empty(held.shape, dtype=torch.bfloat16))
        assert torch.equal(held.rows(rows, torch.bfloat16), dense[rows])
        assert torch.equal(held.rows(slice(5, 42), torch.float32), dense[5:42].float())


def test_the_device_is_asked_once_about_the_positions_until_there_are_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = quantised(make_tensors())
    held, rows = weights.held["c"], torch.tensor([3, 9])
    asked: list[str] = []
    for name, call in (("bincount", torch.bincount), ("tolist", torch.Tensor.tolist)):
        of = torch if name == "bincount" else torch.Tensor
        monkeypatch.setattr(of, name, lambda *a, n=name, c=call: asked.append(n) or c(*a))
    for step in range(2):
        commit(weights, make_gradients(seed=step), 0.3, None)
        asked.clear()
        for _ in range(3):
            held.rows(rows, torch.float32)
            held.rows(slice(0, 9), torch.float32)
        assert asked == ["bincount", "tolist"]


def test_base_takes_the_patch_off_and_puts_it_back() -> None:
    weights = quantised(make_tensors())
    base = {k: v.clone() for k, v in weights.tensors.items()}
    for seed in range(4):
        commit(weights, make_gradients(seed), 0.01, 1.0)
    after = {k: v.clone() for k, v in weights.tensors.items()}
    assert not torch.equal(base["c"], after["c"])
    with pytest.raises(RuntimeError), weights.base():
        assert all(torch.equal(bits_of(base[k]), bits_of(v)) for k, v in weights.tensors.items())
        raise RuntimeError
    assert all(torch.equal(bits_of(after[k]), bits_of(v)) for k, v in weights.tensors.items())


def test_the_overlay_is_sorted_and_holds_the_last_bits_of_each_entry() -> None:
    weights = quantised(make_tensors())
    touched: dict[str, set[int]] = {k: set() for k in SHAPES}
    for seed in range(5):
        for name, changed in commit(weights, make_gradients(seed), 0.003, 1.0).changed.items():
            touched[name] |= set(changed.position_N.tolist())
    for name in ("a", "c"):
        overlay = weights.overlay[name]
        assert overlay.position_N.tolist() == sorted(touched[name])
        assert torch.equal(overlay.bits_N, bits_of(weights.tensors[name])[overlay.position_N])


def test_the_patch_leads_from_the_int8_base_to_the_policy_and_to_nothing_else() -> None:
    weights = quantised(make_tensors())
    for seed in range(3):
        commit(weights, make_gradients(seed), 0.01, 1.0)
    patch = weights.patch({})
    fresh = quantised(make_tensors())
    fresh.write_patch_(patch)
    for name, tensor in weights.tensors.items():
        assert torch.equal(bits_of(tensor), bits_of(fresh.tensors[name]))
    assert fresh.changed_counts() == weights.changed_counts()
    with pytest.raises(AlreadyApplied):
        weights.write_patch_(patch)
    with pytest.raises(WrongBase, match="int8"):
        Weights(make_tensors(), base=BaseInfo("made here", {})).write_patch_(patch)


# --- with a model


def pair(kind: str, *, tied: bool) -> tuple[Decoder, Decoder]:
    """The same policy in int8, and dense: a float32 compute copy of the dequantised values."""
    config = make_config(kind, tied=tied)
    low = quantised(weights_of(make_model(config, dtype=torch.bfloat16)).tensors)
    dense = Weights({k: v.clone() for k, v in low.tensors.items()})
    return Decoder(config, low), Decoder(config, dense)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_is_that_of_a_dense_model_but_for_codes_of_0(kind: str, tied: bool) -> None:
    low, dense = pair(kind, tied=tied)
    rollouts, advantages = make_rollouts(9), torch.linspace(-1, 1, 9)
    steps = [
        Learner(d, 0.01, 1.0, 0.7, micro_tokens=60).step(
            rollouts, lambda logprob_BT: (-(logprob_BT.sum(1) * advantages).mean(), {})
        )
        for d in (low, dense)
    ]
    assert steps[0].loss == steps[1].loss
    assert steps[0].commit.norm == steps[1].commit.norm
    expected = dense.weights.tensors
    for name, tensor in low.weights.tensors.items():
        held = low.weights.held[name]
        differs = bits_of(tensor) != bits_of(expected[name])
        if isinstance(held, Quantised):
            assert bool((held.code_OI.view(-1)[differs] == 0).all())
        else:
            assert not bool(differs.any())
    assert steps[0].commit.entries > 100


@pytest.mark.parametrize("tied", [True, False])
def test_the_engine_samples_what_the_learner_scores(tied: bool) -> None:
    low, dense = pair("qwen2", tied=tied)
    rollouts, advantages = make_rollouts(9), torch.linspace(-1, 1, 9)
    learner = Learner(low, 0.1, 1.0, 1.0, micro_tokens=60)
    for _ in range(2):
        learner.step(rollouts, lambda logprob_BT: (-(logprob_BT.sum(1) * advantages).mean(), {}))
    requests = [Request((8, 9 + i % 3, 11), (0, i)) for i in range(7)]
    sampled = dict(Engine(low, 3, frozenset({5}), 30).generate(requests, max_tokens=12, temperature=1.0))
    scored_BT = learner.log_probs([sampled[i] for i in range(7)])
    for i in range(7):
        row_T = torch.from_numpy(sampled[i].logprob_T)
        torch.testing.assert_close(row_T, scored_BT[i, : len(row_T)], rtol=0, atol=2e-5)  # order of sums
    # and that is the policy, changed entries included
    twin = Decoder(low.config, Weights({k: v.clone() for k, v in low.weights.tensors.items()}))
    same = Learner(twin, 0.1, 1.0, 1.0, micro_tokens=60).log_probs([sampled[i] for i in range(7)])
    assert torch.equal(scored_BT, same)
    assert not torch.equal(
        scored_BT, Learner(dense, 0.1, 1.0, 1.0, 60).log_probs([sampled[i] for i in range(7)])
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_is_quantised_matrix_by_matrix_while_it_is_read(
    dtype: torch.dtype, tied: bool, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("frugal_rl.weights.BLOCK", 1000)  # several blocks of rows, the last one short
    config = make_config("qwen2", tied=tied)
    model = make_model(config, dtype=dtype)
    folder = save_folder(model, tmp_path / "model", tiny_folder)
    weights = Weights.from_checkpoint(
        folder, torch.device("cpu"), name="m", names=parameter_names(config), quantise=True
    )
    original = weights_of(model).tensors
    assert set(weights.held) == set(original)
    matrices = {k for k, v in original.items() if v.ndim == 2}
    assert {k for k, h in weights.held.items() if isinstance(h, Quantised)} == matrices
    for name, tensor in weights.tensors.items():
        if name in matrices:
            assert torch.equal(tensor, Quantised.of(original[name]).rows(slice(0, None), torch.bfloat16))
        else:
            assert torch.equal(tensor, original[name])
    size = sum(original[k].numel() + 4 * len(original[k]) for k in matrices)
    assert weights.nbytes == size + sum(v.nbytes for k, v in original.items() if k not in matrices)
    assert weights.storage_dtype == torch.bfloat16
    assert weights.parameters == sum(v.numel() for v in original.values())
    assert weights.base_info == replace(INFO, name="m (int8)")
    assert weights.held["model.embed_tokens.weight"].shape[0] == VOCABULARY


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_export_adds_what_was_learned_to_the_checkpoints_own_values(
    dtype: torch.dtype, tmp_path: Path, tiny_folder: Path
) -> None:
    config = make_config("qwen2", tied=True)
    model = make_model(config, dtype=dtype)
    folder = save_folder(model, tmp_path / "model", tiny_folder)
    names = parameter_names(config)
    weights = Weights.from_checkpoint(folder, torch.device("cpu"), name="m", names=names, quantise=True)
    base = {k: v.clone() for k, v in weights.tensors.items()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        gradients = {k: torch.randn(v.shape, generator=generator) for k, v in base.items()}
        commit(weights, gradients, 3e-4, None)
    patch, lost = export(weights, folder, "m", {"k": 1})
    assert patch.base == checkpoint.base_info(folder, "m")
    assert patch.meta == {"k": 1}
    trained = Weights.from_checkpoint(folder, torch.device("cpu"), name="m", names=names)
    trained.write_patch_(patch)
    policy, count = weights.tensors, 0
    for name, own in weights_of(model).tensors.items():
        changed = bits_of(policy[name]) != bits_of(base[name])
        if own.ndim == 2:
            sum_OI = own.float() + (policy[name].float() - base[name].float())
            expected = torch.where(changed.view(own.shape), sum_OI.to(dtype), own)
            count += int((changed & (bits_of(expected) == bits_of(own))).sum())
        else:
            expected = policy[name]
        assert torch.equal(bits_of(trained.tensors[name]), bits_of(expected)), name
    assert lost == count
    assert sum(map(len, patch.tensors.values())) == weights.changed_counts()[0] - lost
    # next to nothing is lost in float32; in bf16, entries whose checkpoint value has the coarser grid
    assert lost > 20 if dtype == torch.bfloat16 else lost == 0


def test_the_export_of_an_untrained_policy_is_empty(tiny_folder: Path, tmp_path: Path) -> None:
    config = make_config("llama", tied=True)
    folder = save_folder(make_model(config), tmp_path / "model", tiny_folder)
    weights = Weights.from_checkpoint(
        folder, torch.device("cpu"), name="m", names=parameter_names(config), quantise=True
    )
    patch, lost = export(weights, folder, "m", {})
    assert (len(patch.tensors), lost) == (0, 0)
