"""What runs on a GPU alone, on an emulated one (emulated.py): devices, streams, graphs, waiting, memory."""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from frugal_rl import stream, transit
from frugal_rl.cli import cli
from frugal_rl.decoder import Decoder, build_skeleton, parameter_names
from frugal_rl.errors import FrugalError
from frugal_rl.generate import graphs, transfer
from frugal_rl.generate.engine import Engine
from frugal_rl.generate.graphs import SWITCH
from frugal_rl.learn import Learner, _accumulate_in_float32
from frugal_rl.memory import Shape, _graph_bytes
from frugal_rl.models import find_model, load_tokenizer
from frugal_rl.policy import load_policy
from frugal_rl.rollout import SHARED_TOKENS, Request, Rollout
from frugal_rl.shapes import KNOWN
from frugal_rl.shortage import Surviving
from frugal_rl.storage import Quantised
from frugal_rl.update import within_memory
from frugal_rl.weights import Weights

from . import test_graphs_gpu, test_learn, test_learn_gpu, test_live
from .conftest import make_config, make_decoder, make_rollouts, needs_triton, weights_of
from .emulated import Emulator, emulated

pytestmark = needs_triton  # its interpreter is what kernels run in
GPU = torch.device("cuda")
TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def device() -> Iterator[Emulator]:
    with emulated() as emulator:
        yield emulator


# --- the emulator


def test_a_tensor_is_where_it_was_asked_for(device: Emulator) -> None:
    there = torch.ones(200, device="cuda")
    assert (str(there.device), there.is_cuda, device.allocated) == ("cuda:0", True, 1024)
    for again in (there + 1, there[3:], torch.zeros_like(there), there.double(), there.new_zeros(3)):
        assert again.is_cuda
    assert not there.cpu().is_cuda and torch.ones(3).to(there).is_cuda
    assert torch.arange(4, device=there.device).sum().item() == 6
    del there, again
    assert device.allocated == 0 and device.peak > 2048


def test_operands_are_on_one_device(device: Emulator) -> None:
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert (there + torch.tensor(1.0)).is_cuda  # a single number may be the host's
    weight = torch.ones(3, device="cuda", requires_grad=True)
    (weight * there).sum().backward()
    assert weight.grad is not None and weight.grad.is_cuda


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: torch.nonzero(x),
        lambda x: x[x > 0],
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: x.__setitem__(1, 2.0),
        lambda x: torch.ones(3).to(x.device, non_blocking=True),  # pageable
        lambda x: x[torch.tensor([0, 1])],
    ],
)
def test_waiting_is_seen(device: Emulator, ask: Callable[[torch.Tensor], object]) -> None:
    x = torch.ones(3, device="cuda")
    device.sync_mode = "error"
    for fine in (x + 1, x.fill_(2.0), x.to(torch.float64), torch.where(x > 0, x, 0.0)):
        assert fine.is_cuda
    with pytest.raises(RuntimeError, match="synchronizing"):
        ask(x)
    device.sync_mode = "default"
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ask(x)


def test_two_streams_that_touch_the_same_memory_in_no_order_race(device: Emulator) -> None:
    x, side = torch.ones(3, device="cuda"), torch.cuda.Stream()
    with torch.cuda.stream(side):
        x.add_(1)
    assert "stream 1 touches what the default stream" in device.races[0]
    device.races.clear()
    torch.cuda.current_stream().wait_stream(side)
    y = x + 1
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y += x
        done = torch.cuda.Event()
        done.record()
    del y  # its own stream may have it again at once
    z = torch.ones(3, device="cuda")
    assert len(device.races) == 1 and "has freed" in device.races[0]
    device.races.clear()
    torch.cuda.current_stream().wait_event(done)
    x.add_(z)


def test_the_host_reads_what_has_arrived(device: Emulator) -> None:
    x = torch.ones(3, device="cuda")
    here = torch.empty(3, pin_memory=True).copy_(x, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    here.numpy()
    assert len(device.races) == 1 and "the host touches what the default stream" in device.races[0]
    device.races.clear()
    done.synchronize()
    assert here.tolist() == [1.0] * 3


def test_a_graph_does_again_what_was_captured_and_capturing_does_nothing(device: Emulator) -> None:
    x, y, graph = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda"), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        y.add_((x * 2).relu())
    assert y.tolist() == [0.0] * 3
    for value in (1.0, -1.0, 5.0):
        x.fill_(value)
        graph.replay()
    assert y.tolist() == [12.0] * 3


def test_memory_has_a_limit(device: Emulator) -> None:
    x = torch.empty(1 << 20, device="cuda")
    torch.cuda.set_per_process_memory_fraction(device.allocated / device.total, 0)
    with pytest.raises(torch.OutOfMemoryError):
        x + 1
    assert device.allocated == x.nbytes
    del x
    torch.empty(1 << 20, device="cuda")


# --- the project


def on_gpu(dtype: torch.dtype = torch.bfloat16) -> Decoder:
    model, _ = make_decoder("qwen2", dtype=dtype)
    return Decoder(model.config, Weights({k: v.cuda() for k, v in weights_of(model).tensors.items()}))


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ['model.weights="int8"', "rollout.kv_budget=24", 'loss.correction="tis"'],
        ['model.weights="host"', 'model.reference="tiny"', "loss.kl=0.01"],
    ],
    ids=["bf16", "int8, evicting", "host, reference"],
)
def test_a_run_trains(device: Emulator, tmp_path: Path, changes: list[str]) -> None:
    """Nothing races and nothing is left; a run that is repeated has the same patch."""
    sizes = {"train.steps": 2, "data.heldout": 4, "rollout.prompts": 4, "rollout.samples": 4}
    options = [f"{key}={value}" for key, value in sizes.items()] + ["rollout.max_tokens=32", *changes]
    patches = []
    for name in ("one",) if changes else ("one", "two"):  # the repetition costs as much again
        words = [
            "train",
            *(word for option in options for word in ("--set", option)),
            "-o",
            str(tmp_path / name),
        ]
        done = CliRunner().invoke(cli, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["device"] == "emulated" and summary["changed_any"] > 1000
        patches.append((tmp_path / name / "patch.safetensors").read_bytes())
        gc.collect()
        assert device.allocated == 0  # also on the host
        assert device.pinned == 0
    assert patches[0] == patches[-1]


def test_kernels_draw_the_tokens_of_plain_pytorch_and_are_captured(
    device: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a patch, in the interpreter's float32; what they are given is on the device."""
    model, _ = make_decoder("qwen2", dtype=torch.bfloat16, layers=1)
    tensors = {name: tensor.cuda() for name, tensor in weights_of(model).tensors.items()}
    matrices = {name: Quantised.of(tensor) for name, tensor in tensors.items() if tensor.ndim == 2}
    decoder = Decoder(model.config, Weights(tensors | matrices, compute_dtype=torch.float32))
    learner = Learner(decoder, 0.1, 1.0, 1.0, 100)
    learner.step(make_rollouts(2), test_learn.policy_gradient(torch.linspace(-1, 1, 2, device="cuda")))
    requests, drawn = [Request((8, 9, 10 + i), (0, i)) for i in range(2)], []
    for choice in ("plain", "triton"):
        monkeypatch.setenv("FRUGAL_RL_KERNELS", choice)
        engine = Engine(decoder, 2, frozenset({5}), 30)
        with decoder.sampling():
            assert bool(decoder._matrices) == (choice == "triton")
        sampled = dict(engine.generate(requests, max_tokens=4, temperature=1.0))
        assert engine.stats.graphs
        drawn.append([sampled[i].response_ids.tolist() for i in range(2)])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("form", "method"), [("bf16", None), ("int8", "rkv"), ("bf16", "h2o"), ("int8", "streaming")]
)
def test_graphs_draw_the_tokens_of_the_step_itself(
    device: Emulator, form: str, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = test_graphs_gpu.make_requests(4, 2)
    monkeypatch.setattr(test_graphs_gpu, "make_requests", lambda: few)
    engine = test_graphs_gpu.make_engine(test_graphs_gpu.make_decoder(form), method)
    test_graphs_gpu.compare(engine, monkeypatch, 1.0)


@pytest.mark.parametrize(("form", "method"), [("int8", None), ("bf16", "rkv"), ("bf16", "h2o")])
def test_no_step_and_no_eviction_waits(
    device: Emulator, form: str, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    test_graphs_gpu.test_no_step_and_no_eviction_waits_for_the_device(form, method, monkeypatch)


def test_a_step_that_waits_cannot_be_captured(device: Emulator) -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(FrugalError, match=f"{SWITCH}=off"):
        graphs.CudaGraphs(x.device).capture(lambda: x.sum().item())
    assert torch.cuda.current_stream() is torch.cuda.default_stream()


@pytest.mark.parametrize("every", [1, 2])
def test_states_on_the_host_change_nothing(device: Emulator, every: int) -> None:
    test_learn.test_keeping_states_on_the_host_of_a_gpu_changes_nothing(every)


def test_responses_behind_one_prompt_are_those_of_a_cpu(
    device: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    test_learn_gpu.test_on_a_gpu_responses_behind_one_prompt_repeat_and_are_those_of_a_cpu(16, monkeypatch)


def test_a_module_is_patched_in_place(device: Emulator) -> None:
    test_live.test_a_module_on_a_gpu_is_patched_in_place()


# --- races: each order that is kept is one that is needed


def learn_with_states_on_the_host() -> None:
    decoder = on_gpu()
    learner = Learner(decoder, 0.1, 1.0, 1.0, 40, boundary_on_host=True)
    loss = test_learn.policy_gradient(torch.linspace(-1, 1, 12, device="cuda"))
    for _ in range(2):
        learner.step(make_rollouts(12), loss)


def learn_with_streamed_weights() -> None:
    files = find_model("tiny")
    policy = load_policy(files, load_tokenizer(files), GPU, form="host")
    rollouts = [
        replace(r, prompt_ids=tuple(t % 30 for t in r.prompt_ids), response_ids=r.response_ids % 30)
        for r in make_rollouts(6)
    ]
    learner = Learner(policy.decoder, 0.01, 1.0, 1.0, 40)
    for _ in range(2):
        learner.step(rollouts, test_learn.policy_gradient(torch.linspace(-1, 1, 6, device="cuda")))


def sample() -> None:
    engine = Engine(on_gpu(), 3, frozenset({5}), 30)
    dict(engine.generate([Request((8, 9, 10 + i), (0, i)) for i in range(6)], max_tokens=9, temperature=1.0))


RUNS = (learn_with_states_on_the_host, learn_with_streamed_weights, sample)
CURRENT = "self.cuda.current_stream(self.device)"
KEPT: list[tuple[Any, str, str, Callable[[], None]]] = [
    (transit.Transit, "_wait", f"{CURRENT}.wait_event(done)", RUNS[0]),
    (transit.Transit, "_copied", f"self._side.wait_stream({CURRENT})", RUNS[0]),
    (stream._Buffer, "release_by_compute", f"self.free.record({CURRENT})", RUNS[1]),
    (stream._Buffer, "fill", "self.arrived.synchronize()", RUNS[1]),
    (stream._Buffer, "fill", "self.side.wait_event(self.free)", RUNS[1]),
    (stream._Buffer, "fill", "self.arrived.record(self.side)", RUNS[1]),
    (stream._Buffer, "wait_arrived", f"{CURRENT}.wait_event(self.arrived)", RUNS[1]),
    (transfer.Arriving, "wait", "self._event.synchronize()", RUNS[2]),
    (graphs.CudaGraphs, "run", "self._stream.wait_stream(current)", RUNS[2]),
    (graphs.CudaGraphs, "run", "current.wait_stream(self._stream)", RUNS[2]),
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_nothing_races(device: Emulator, run: Callable[[], None]) -> None:
    run()
    assert not device.races


@pytest.mark.parametrize(
    ("owner", "name", "line", "run"), KEPT, ids=[f"{n}: {line}" for _, n, line, _ in KEPT]
)
def test_without_an_order_that_is_kept_there_is_a_race(
    owner: Any, name: str, line: str, run: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(line) == 1
    names = dict(vars(inspect.getmodule(function)))
    exec(source.replace(line, "pass"), names)
    monkeypatch.setattr(owner, name, names[name])
    with emulated() as device:
        run()
        assert device.races
        device.races.clear()


# --- memory


def test_generating_goes_on_in_fewer_slots_when_memory_runs_out(device: Emulator) -> None:
    decoder, said = on_gpu(), []
    requests = [Request((8, 9, 10 + i), (0, i)) for i in range(8)]

    def generate() -> dict[int, Rollout]:
        sampler = Surviving(Engine(decoder, 8, frozenset({5}), 30), GPU, said.append)
        return dict(sampler.generate(requests, max_tokens=24, temperature=1.0))

    held = device.allocated
    expected = generate()
    assert not said
    device.limit = (held + device.peak) // 2
    survived = generate()
    assert said and "in 4 slots" in said[0]
    for index, rollout in expected.items():
        assert survived[index].response_ids.tolist() == rollout.response_ids.tolist()
    gc.collect()
    assert device.allocated == held


def test_learning_goes_on_with_smaller_micro_batches_when_memory_runs_out(device: Emulator) -> None:
    rollouts, said, results = make_rollouts(30), [], []
    loss = test_learn.policy_gradient(torch.linspace(-1, 1, 30, device="cuda"))
    for limited in (False, True):
        decoder = on_gpu()
        learner = Learner(decoder, 0.1, 1.0, 1.0, 1000)
        device.peak = device.allocated
        results.append(within_memory(learner, said.append, lambda: learner.step(rollouts, loss)))  # noqa: B023
        if not limited:
            assert not said
            device.limit = device.peak - 4096
            del decoder, learner
    assert said == ["out of memory: going on with micro-batches of 500 tokens"]
    assert results[1].commit.norm == pytest.approx(results[0].commit.norm, rel=1e-2)


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_token_takes_what_autograd_keeps_of_it(kind: str, together: int) -> None:
    """Of rows of several responses, through layers that go backward together."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "head_dim": 128, "num_attention_heads": 16}
    config = make_config(kind, layers=2, tied=False, **sizes, num_key_value_heads=4)
    rows, width = 4, SHARED_TOKENS
    with emulated(64 << 30, numbers=False) as device, ExitStack() as stack:
        names, skeleton = parameter_names(config), build_skeleton(config)
        tensors = {
            name: torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
            for name, parameter in skeleton.named_parameters()
            if name in names
        }
        decoder = Decoder(config, Weights(tensors))
        layers = [stack.enter_context(decoder.layer(i, learn=True, place=i)) for i in range(together)]
        stack.enter_context(_accumulate_in_float32(layers))
        state = torch.empty(rows, width, 2048, dtype=torch.bfloat16, device="cuda")
        mask = torch.empty(rows, 1, width, width, dtype=torch.bool, device="cuda")
        arguments = [{**caught, "slot_mask": mask} for caught in decoder.arguments(state)]
        for _ in range(2):  # the first makes room for the gradients
            device.peak = before = device.allocated
            hidden = state.detach().requires_grad_()
            for layer, caught in zip(layers, arguments, strict=False):
                hidden = layer(hidden, **caught)
            torch.autograd.backward(hidden, state)
            del hidden
        counted = (device.peak - before) / (rows * width) - 2 * width * together  # the mask as numbers
    planned = _graph_bytes(Shape.from_config(config.to_dict()), 2, together)
    assert planned == pytest.approx(counted, rel=5e-3)


def test_the_plan_is_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole steps of a real shape, without numbers. So small, the head's 80 MiB of proposals show."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import count_memory

    options = count_memory.read_options(
        [
            "--runs",
            "Qwen2.5-0.5B:int8",
            "--prompts",
            "4",
            "--samples",
            "4",
            "--max-tokens",
            "64",
            "--cap",
            "3GiB",
        ]
    )
    monkeypatch.setenv("FRUGAL_RL_KERNELS", "triton")
    row = count_memory.run_one(options)
    for phase, ratio in row["plan_over_count"].items():
        assert 0.97 < ratio < 1.15, (phase, row)


# --- scripts


def test_attention_is_timed_beside_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA's kernels return lies otherwise in memory than what a CPU's do."""
    monkeypatch.setenv("FRUGAL_RL_KERNELS", "triton")  # as the script sets it, for itself
    monkeypatch.syspath_prepend(str(TOOLS))
    import bench_kernels

    options = argparse.Namespace(torch_device=GPU, compute=torch.bfloat16)
    with emulated(numbers=False):
        rows = bench_kernels.attentions(KNOWN["Qwen2.5-0.5B"], [2], options, 1.0)
    assert [row["ragged"] for row in rows] == [False, True]


@pytest.mark.parametrize("form", ["int8", "bf16"])
def test_a_learners_step_is_timed(device: Emulator, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    import bench_learn

    options = argparse.Namespace(
        runs=f"small:{form}", device="cuda", cap="1GiB", sequences=4, tokens=32, peer_sequences=2
    )
    row = bench_learn.run_one(options)
    assert row["repeats"] and row["device"] == "emulated"
    assert 0 < row["peak_bytes"] == row["reserved_bytes"] <= device.limit == 1 << 30
    assert set(row["phase_peak_bytes"]) == {phase.strip("_") for phase in bench_learn.PHASES}
