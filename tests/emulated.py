"""A CUDA device in host memory, so that what runs on a GPU alone runs where there is none.

Tensors that are asked for on `cuda` are ordinary ones whose memory is marked: Python is told that they are on
`cuda:0`, PyTorch computes with them on the CPU. What a GPU would refuse, or do wrong in silence, is an error:

- operands on two devices, `numpy()` of what is on the device, memory over a limit (torch.OutOfMemoryError);
- waiting for the device while a graph is captured, or where torch.cuda.set_sync_debug_mode forbids it;
- races: two streams, or a stream and the host, that touch the same memory in no order, also by way of the
  allocator, which gives what a stream has freed to that stream again at once. Every stream and the host has a
  vector clock (Fidge 1988, Mattern 1989); launches, events and waiting carry what is known of the others.

CUDA graphs note what PyTorch and Triton's interpreter are asked for, undo it, and do it again when replayed,
in the same memory.

With `numbers=False` the memory is PyTorch's `meta` device: nothing is computed, and a model of any size can
be counted. `allocated` and `peak` are what torch.cuda would say, but that a graph's pool counts as long as it
lives. What the host reads of the device then is `answer`; of a mask `true_of` are true.

Not emulated: time; the arithmetic of CUDA's kernels, of cuBLAS and of Triton's compiler; cuBLAS's workspaces.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CUDA = torch.device("cuda", 0)
META = torch.device("meta")
TOTAL = 24 << 30
GRAIN = 512  # bytes: the allocator's
HOST = "the host"

Clock = dict[str, int]  # of each stream, and of the host: up to which of its actions all is known to be over

# what asks the device for a value, or has a shape that depends on one
ASKS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique",
    "unique_",
    "equal.default",
    "is_nonzero",
    "repeat_interleave.Tensor",
    "bincount",
    "isin",
)
COPIES = ("aten.copy_.", "aten._to_copy.")
DEVICES_MAY_DIFFER = (*COPIES, "aten.set_.", "aten.lift_fresh.")


def join(clock: Clock, other: Clock) -> None:
    for name, tick in other.items():
        if clock[name] < tick:
            clock[name] = tick


# --- what stands for classes of torch.cuda


class Stream:
    """torch.cuda.Stream."""

    def __init__(self, device: object = None, name: str | None = None, **_: object) -> None:
        self.device = CUDA
        self.clock: Clock = defaultdict(int)
        emulator().streams.add(self)
        self.name = name or f"stream {next(emulator().numbers)}"

    def wait_stream(self, other: Stream) -> None:
        join(self.clock, other.clock)

    def wait_event(self, event: Event) -> None:
        join(self.clock, event.clock)

    def synchronize(self) -> None:
        join(emulator().host, self.clock)


class Event:
    """torch.cuda.Event."""

    def __init__(self, **_: object) -> None:
        self.clock: Clock = defaultdict(int)

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or emulator().current
        emulator().launch(stream)
        self.clock = defaultdict(int, stream.clock)

    def synchronize(self) -> None:
        join(emulator().host, self.clock)

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class Pool:
    """Of graphs, where they hold none of their memory: as much as the largest of them takes."""

    def __init__(self) -> None:
        self.size = 0
        self.graphs: set[Graph] = set()


class Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.actions: list[Callable[[], object]] = []
        self.own: set[int] = set()  # memory that was taken meanwhile
        self.before: dict[int, tuple[Any, Any]] = {}  # memory of others that was written to, and what it held
        self.captured = False
        self.pool: Pool | None = None

    def replay(self) -> None:
        assert self.captured, "nothing was captured, or it was reset"
        with untouched():
            for action in self.actions:
                action()

    def reset(self) -> None:
        self.actions, self.captured = [], False
        if self.pool is not None:
            self.pool.graphs.discard(self)
            if not self.pool.graphs:
                emulator().allocated -= self.pool.size
                self.pool.size = 0
        self.pool = None

    def will_write(self, storages: list[Any]) -> None:
        for storage in storages:
            if storage._cdata not in self.own and storage._cdata not in self.before:
                self.before[storage._cdata] = storage, storage.clone()


class Capture:
    """torch.cuda.graph. One that fails leaves its own stream the current one, as there."""

    def __init__(
        self, graph: Graph, pool: Pool | None = None, stream: Stream | None = None, **_: object
    ) -> None:
        self.graph, self.pool, self.stream = graph, pool or Pool(), stream or Stream()

    def __enter__(self) -> None:
        device = emulator()
        device.synchronize()
        self.outside, device.current = device.current, self.stream
        join(self.stream.clock, device.host)
        device.capturing = self.graph
        device.allocated -= self.pool.size  # free for this graph
        self.base, self.peak, device.peak = device.allocated, device.peak, device.allocated

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        device = emulator()
        device.capturing = None
        if not device.has_numbers:
            self.pool.size = max(self.pool.size, device.peak - self.base)
            self.pool.graphs.add(self.graph)
            self.graph.pool = self.pool
        device.allocated += self.pool.size
        device.peak = max(device.peak, self.peak, device.allocated)
        if error is not None:
            return
        with untouched():
            for storage, held in self.graph.before.values():
                storage.copy_(held)
        self.graph.before, self.graph.captured = {}, True
        device.current = self.outside


# --- the device


class Memory:
    """A block that the device can reach: where it is, who took it, and who touched it last."""

    def __init__(self, place: str, size: int, stream: Stream) -> None:
        self.place, self.size, self.stream = place, size, stream
        self.written: tuple[str, int] | None = None
        self.read: Clock = {}

    def touched(self, *, by_readers: bool) -> Iterator[tuple[str, int]]:
        """Who wrote last, and who has read since."""
        if self.written is not None:
            yield self.written
        if by_readers:
            yield from self.read.items()


class Emulator:
    """The device. `races` is what went wrong; `syncs` how often the host has waited."""

    def __init__(self, total: int, has_numbers: bool) -> None:
        self.total = self.limit = total
        self.has_numbers = has_numbers
        self.backing = torch.device("cpu") if has_numbers else META
        self.allocated = self.peak = self.pinned = self.syncs = 0
        self.races: list[str] = []
        self.streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self.numbers = iter(range(1, 1 << 62))
        self.host: Clock = defaultdict(int)
        self.capturing: Graph | None = None
        self.sync_mode = "default"
        self.answer: Callable[[Tensor], float] = lambda value: 0
        self.true_of: Callable[[Tensor], int] = lambda mask: mask.numel()
        self.freed: list[Memory] = []  # while somebody else than its stream may use it
        self.local = _Local()
        self.default: Stream

    @property
    def current(self) -> Stream:
        """The stream that this thread launches on."""
        if self.local.stream is None:
            self.local.stream = self.default
        return self.local.stream

    @current.setter
    def current(self, stream: Stream) -> None:
        self.local.stream = stream

    def launch(self, stream: Stream) -> None:
        """Something is asked of a stream: what the host knows to be over is over before it."""
        join(stream.clock, self.host)
        stream.clock[stream.name] += 1

    def synchronize(self, _: object = None) -> None:
        for stream in self.streams:
            join(self.host, stream.clock)

    def waits(self, why: str) -> None:
        """The host waits for the current stream."""
        if self.capturing is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({why})")
        if self.sync_mode == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation ({why})")
        self.syncs += 1
        join(self.host, self.current.clock)

    def take(self, storage: Any, place: str) -> None:
        """A block that was made just now is on the device, or page-locked. Raises torch.OutOfMemoryError."""
        size = -(-storage.nbytes() // GRAIN) * GRAIN
        if place == "cuda":
            self._reuse(self.current)
            if self.allocated + size > self.limit:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory: {size} bytes beside {self.allocated} of {self.limit}"
                )
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
            if self.capturing is not None:
                self.capturing.own.add(storage._cdata)
        else:
            self.pinned += size
        storage.memory = Memory(place, size, self.current)
        weakref.finalize(storage, self._free, storage.memory).atexit = False

    def _free(self, memory: Memory) -> None:
        if memory.place == "cuda":
            self.allocated -= memory.size
            if any(self._in_use(memory)):
                self.freed.append(memory)
        else:
            self.pinned -= memory.size

    def _in_use(self, memory: Memory) -> Iterator[str]:
        """Who else may still be using a block when its own stream does the next thing."""
        own = memory.stream
        for name, tick in memory.touched(by_readers=True):
            if name != own.name and max(own.clock[name], self.host[name]) < tick:
                yield name

    def _reuse(self, stream: Stream) -> None:
        mine = [memory for memory in self.freed if memory.stream is stream]
        for memory in mine:
            self.races += [
                f"{memory.size} bytes that {stream.name} has freed are taken again while {name} uses them"
                for name in self._in_use(memory)
            ]
        if mine:
            self.freed = [memory for memory in self.freed if memory.stream is not stream]

    def touch(self, storages: list[tuple[Any, bool]], what: str, *, on_host: bool = False) -> None:
        """The current stream, or the host, reads (False) or writes (True) blocks."""
        name, clock = (HOST, self.host) if on_host else (self.current.name, self.current.clock)
        if on_host:
            clock[name] += 1
        else:
            self.launch(self.current)
        for storage, writes in storages:
            memory = memory_of(storage)
            if memory is None:
                continue
            for other, tick in memory.touched(by_readers=writes):
                if other != name and clock[other] < tick:
                    self.races.append(f"{what}: {name} touches what {other} may still be using")
            if writes:
                memory.written, memory.read = (name, clock[name]), {}
            else:
                memory.read[name] = clock[name]

    def host_touches(self, tensor: Tensor, what: str) -> None:
        """Of page-locked memory: it is not known whether it writes."""
        self.touch([(tensor.untyped_storage(), True)], what, on_host=True)


class _Local(threading.local):
    """Of a thread: its stream, and how what Python has asked for is to be placed."""

    stream: Stream | None = None
    force: str | None = None  # where results go
    ambient: str = "cpu"  # where something made of nothing goes
    moving: bool = False  # a copy whose waiting is counted already


_current: list[Emulator] = []


def emulator() -> Emulator:
    return _current[-1]


def memory_of(storage: Any) -> Memory | None:
    return getattr(storage, "memory", None)


def place_of(tensor: Tensor) -> str:
    """cuda, pinned or cpu."""
    memory = memory_of(tensor.untyped_storage())
    return memory.place if memory else "cpu"


def tensors_in(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [tensor for value in values for tensor in tensors_in(value)]


@contextmanager
def untouched() -> Iterator[None]:
    """PyTorch as it is."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        yield


# --- what PyTorch computes


@cache
def about(func: Any) -> tuple[str, bool, list[tuple[int, str]]]:
    """An operation's name, whether it is another way to see its operand, and which arguments it writes to."""
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    writes = [
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return str(func), view, writes


def asks(name: str, args: Any) -> bool:
    """Whether the shape or value of the result must come to the host."""
    indexed = args[1] if "index" in name and len(args) > 1 and isinstance(args[1], list | tuple) else []
    return any(is_mask(index) for index in indexed) or any(ask in name for ask in ASKS)


def is_mask(index: object) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


class Operations(TorchDispatchMode):
    def __init__(self, device: Emulator) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device, local, kwargs = self.device, self.device.local, dict(kwargs or {})
        name, view, writes = about(func)
        operands = tensors_in((args, kwargs))
        places = [place_of(tensor) for tensor in operands]
        on_device = "cuda" in places
        if on_device:
            self._check(name, operands, places)
        made_of_nothing = not operands or name.startswith("aten.lift_fresh")
        target = local.force or ("cuda" if on_device else local.ambient if made_of_nothing else "cpu")
        involved = on_device or target == "cuda"
        if name.startswith(COPIES):
            self._copied(name, places, target, args, kwargs)
        elif on_device and asks(name, args):
            device.waits(name)
        if involved and "device" in kwargs:
            kwargs["device"] = device.backing
        written = [
            tensor.untyped_storage()
            for place, word in writes
            for tensor in tensors_in(args[place] if place < len(args) else kwargs.get(word))
        ]
        graph = device.capturing if involved and device.has_numbers else None
        if graph is not None:
            with untouched():
                graph.will_write(written)
        out = compute(func, name, args, kwargs, device) if involved else func(*args, **kwargs)
        read = [tensor.untyped_storage() for tensor in operands]
        before = {storage._cdata for storage in read}
        for tensor in tensors_in(out):
            storage = tensor.untyped_storage()
            fresh = made_of_nothing or storage._cdata not in before
            if target == "cuda" and fresh and memory_of(storage) is None:
                device.take(storage, "cuda")
                written.append(storage)
        if view:
            return out
        if not involved:
            for tensor, place in zip(operands, places, strict=True):
                if place == "pinned":
                    device.host_touches(tensor, name)
            return out
        touched = [(storage, False) for storage in read] + [(storage, True) for storage in written]
        if device.capturing is None:
            device.touch(touched, name)
        elif graph is not None:
            graph.actions.append(partial_replay(func, name, args, kwargs, out, before, touched, device))
        return out

    def _check(self, name: str, operands: list[Tensor], places: list[str]) -> None:
        """Operands of the host, where others are on the device: single numbers, and indices with a sync."""
        if name.startswith(DEVICES_MAY_DIFFER):
            return
        if any(place != "cuda" and tensor.ndim for tensor, place in zip(operands, places, strict=True)):
            if "index" not in name or places[0] != "cuda":
                raise RuntimeError(
                    f"Expected all tensors to be on the same device (emulated): {name} of {', '.join(places)}"
                )
            self.device.waits(f"{name} by indices of the host")

    def _copied(self, name: str, places: list[str], target: str, args: Any, kwargs: Any) -> None:
        """Between the host and the device: waits, but for what is page-locked where that was asked for."""
        to, source = (places[0], places[-1]) if name.startswith("aten.copy_") else (target, places[0])
        later = bool(kwargs.get("non_blocking", len(args) > 2 and args[2]))
        crosses = (to == "cuda") != (source == "cuda") and not self.device.local.moving
        if crosses and (not later or "cpu" in (to, source)):
            self.device.waits(f"{name} from {source} to {to}")


def partial_replay(
    func: Any,
    name: str,
    args: Any,
    kwargs: Any,
    out: Any,
    before: set[int],
    touched: list[tuple[Any, bool]],
    device: Emulator,
) -> Callable[[], None]:
    """An operation again, its results where they were when it was recorded."""
    recorded = tensors_in(out)

    def again() -> None:
        device.touch(touched, f"{name} of a graph")
        for old, new in zip(recorded, tensors_in(compute(func, name, args, kwargs, device)), strict=True):
            if old.untyped_storage()._cdata not in before:
                assert (old.shape, old.dtype) == (new.shape, new.dtype)
                old.copy_(new)

    return again


def compute(func: Any, name: str, args: Any, kwargs: Any, device: Emulator) -> Any:
    if name in ("aten.mm.dtype", "aten.addmm.dtype", "aten.addmm.dtype_out"):
        return product_in_float32(name, args, kwargs)
    return func(*args, **kwargs) if device.has_numbers else without_numbers(func, name, args, kwargs, device)


def product_in_float32(name: str, args: Any, kwargs: Any) -> Any:
    """Of bf16, added up in the format that is given last: PyTorch has these on CUDA alone."""
    *added, left, right, dtype = args
    result = left.new_empty(left.shape[0], right.shape[1], dtype=dtype)
    if not left.is_meta:
        torch.mm(left.to(dtype), right.to(dtype), out=result)
        for bias in added:
            result += bias
    return kwargs["out"].copy_(result) if name.endswith("_out") else result


def without_numbers(func: Any, name: str, args: Any, kwargs: Any, device: Emulator) -> Any:
    """Shapes and formats; where they depend on values, `answer` and `true_of` say them."""

    def positions(count: int, *more: int) -> Tensor:
        return torch.empty(count, *more, dtype=torch.int64, device=META)

    first = args[0] if args and isinstance(args[0], Tensor) else None
    if name.startswith("aten._local_scalar_dense"):
        assert first is not None
        kind = bool if first.dtype == torch.bool else float if first.dtype.is_floating_point else int
        return kind(device.answer(first))
    if name.startswith("aten.equal."):
        return True
    if name.startswith("aten.nonzero."):
        assert first is not None
        return positions(device.true_of(first), first.ndim)
    if name.startswith("aten._unique2."):
        assert first is not None
        return first.new_empty(first.numel()), positions(first.numel()), positions(first.numel())
    if name.startswith("aten.repeat_interleave.Tensor"):
        assert first is not None
        return positions(2 * first.numel())
    if name.startswith("aten.bincount."):
        return positions(max(1, kwargs.get("minlength", 1)))
    if name.startswith(("aten.index_put", "aten._index_put")):
        return first
    if name.startswith("aten.index.Tensor"):
        indices: list[Tensor | None] = []
        for index in args[1]:
            if is_mask(index):
                indices += [positions(device.true_of(index))] * index.ndim
            else:
                indices.append(None if index is None else index.to(META))
        return func(first, indices)
    if name.startswith("aten.copy_."):
        assert first is not None
        # large memory of the host is left as it is: what is not touched takes no room
        return first if first.is_meta or first.numel() > 1 << 20 else first.zero_()
    return func(*args, **kwargs)


# --- what Python asks of PyTorch


class Calls(TorchFunctionMode):
    def __init__(self, device: Emulator) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args[0])
        special = getattr(self, f"_do_{name}", None)
        if special is not None:
            done = special(args, kwargs)
            if done is not NotImplemented:
                return done
        operands = tensors_in((args, kwargs))
        asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        force = "cpu" if asked is not None or not operands else None
        if asked is not None and asked.type == "cuda":
            force, kwargs["device"] = "cuda", self.device.backing
            if name in ("tensor", "as_tensor"):
                self.device.waits("a tensor made of the host's values")
        page_locked = bool(kwargs.pop("pin_memory", False))
        ambient = "cuda" if any(place_of(tensor) == "cuda" for tensor in operands) else "cpu"
        with self._placing(force, ambient):
            out = func(*args, **kwargs)
        if page_locked:
            self.device.take(out.untyped_storage(), "pinned")
        if force == "cuda" and not operands and memory_of(out.untyped_storage()) is None:
            self.device.take(out.untyped_storage(), "cuda")  # torch.tensor makes it out of sight
        return out

    @contextmanager
    def _placing(self, force: str | None, ambient: str, *, moving: bool = False) -> Iterator[None]:
        local = self.device.local
        before = local.force, local.ambient, local.moving
        local.force, local.ambient, local.moving = force, ambient, moving
        try:
            yield
        finally:
            local.force, local.ambient, local.moving = before

    def _attribute(self, func: Any, tensor: Tensor) -> Any:
        name = getattr(func.__self__, "__name__", "")
        if name in ("device", "is_cuda", "is_cpu", "is_meta") and place_of(tensor) == "cuda":
            return CUDA if name == "device" else name == "is_cuda"
        return func(tensor)

    # --- between devices

    def _do_to(self, args: Any, kwargs: Any) -> Any:
        tensor, *rest = args
        if rest and isinstance(rest[0], Tensor):
            rest[:1] = [CUDA if place_of(rest[0]) == "cuda" else rest[0].device, rest[0].dtype]
        copy = kwargs.pop("copy", False)
        device, dtype, later, _ = torch._C._nn._parse_to(*rest, **kwargs)
        return NotImplemented if device is None else self._moved(tensor, device, dtype, later, copy)

    def _do__parse_to(self, args: Any, kwargs: Any) -> Any:
        return torch._C._nn._parse_to(*args, **kwargs)  # of a module's `to`: no tensor yet

    def _do_cuda(self, args: Any, kwargs: Any) -> Any:
        return self._moved(args[0], CUDA, None, bool(kwargs.get("non_blocking")), False)

    def _do_cpu(self, args: Any, kwargs: Any) -> Any:
        return self._moved(args[0], torch.device("cpu"), None, False, False)

    def _moved(self, tensor: Tensor, device: torch.device, dtype: Any, later: bool, copy: bool) -> Any:
        here, to = place_of(tensor), "cuda" if device.type == "cuda" else "cpu"
        dtype = dtype or tensor.dtype
        if device.type == "meta":
            return tensor.to(device, dtype)
        if (here == "cuda") == (to == "cuda"):
            if dtype == tensor.dtype and not copy:
                return tensor
            with self._placing(None, to):
                return tensor.to(dtype, copy=copy)
        if not later or "cpu" in (here, to):
            self.device.waits(f"a copy from {here} to {to}")
        with self._placing(to, to, moving=True):
            if self.device.has_numbers:
                return tensor.to(dtype, copy=True)
            make = torch.zeros if to == "cpu" else torch.empty
            return make(tensor.shape, dtype=dtype, device="cpu" if to == "cpu" else META)

    def _do_pin_memory(self, args: Any, kwargs: Any) -> Any:
        with self._placing("cpu", "cpu"):
            out = args[0].clone()
        self.device.take(out.untyped_storage(), "pinned")
        return out

    # --- to the host

    def _do_numpy(self, args: Any, kwargs: Any) -> Any:
        if place_of(args[0]) == "cuda":
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return self._read(args, kwargs)

    _do___array__ = _do_numpy

    def _do_tolist(self, args: Any, kwargs: Any) -> Any:
        if place_of(args[0]) == "cuda":
            self.device.waits("tolist")
            if not self.device.has_numbers:
                return torch.zeros(args[0].shape, dtype=args[0].dtype).tolist()
        return self._read(args, kwargs)

    def _read(self, args: Any, kwargs: Any) -> Any:
        if place_of(args[0]) == "pinned":
            self.device.host_touches(args[0], "reading")
        return NotImplemented

    def _do___setitem__(self, args: Any, kwargs: Any) -> Any:
        if place_of(args[0]) == "cuda" and not isinstance(args[2], Tensor):
            self.device.waits("a number assigned by index")  # see generate/transfer.py
        return NotImplemented

    # --- what is chosen by the device in C++, and what calls Python again

    def _do_scaled_dot_product_attention(self, args: Any, kwargs: Any) -> Any:
        """Without numbers: the kernels that CUDA has for 16 bits."""
        query, key = args[:2]
        if self.device.has_numbers or place_of(query) != "cuda" or query.dtype == torch.float32:
            return NotImplemented
        mask, causal, scale = kwargs.get("attn_mask"), bool(kwargs.get("is_causal")), kwargs.get("scale")
        with self._placing(None, "cuda"):
            if type(mask) is not Tensor:
                causal = causal or mask is not None
                ops = torch.ops.aten._scaled_dot_product_flash_attention
                return ops(*args[:3], 0.0, causal, False, scale=scale)[0]
            bias = torch.zeros(mask.shape, dtype=query.dtype, device=META).masked_fill(~mask, -1.0)
            bias = bias.expand(*query.shape[:-1], key.shape[-2])
            ops = torch.ops.aten._scaled_dot_product_efficient_attention
            return ops(*args[:3], bias, query.requires_grad, 0.0, causal, scale=scale)[0]

    def _do_backward(self, args: Any, kwargs: Any) -> Any:
        """Functions and hooks of Python run in it: under this mode."""
        words = ("tensors", "grad_tensors", "retain_graph", "create_graph")
        given = dict(zip(words, args, strict=False)) | kwargs
        tensors, slopes = given["tensors"], given.get("grad_tensors", given.get("gradient"))
        tensors, slopes = (
            value if isinstance(value, list | tuple) else (value,) for value in (tensors, slopes)
        )
        slopes = tuple(torch.ones_like(t) if s is None else s for t, s in zip(tensors, slopes, strict=True))
        ambient = "cuda" if any(place_of(tensor) == "cuda" for tensor in tensors) else "cpu"
        with self._placing(None, ambient), self:
            torch.autograd.graph._engine_run_backward(
                tuple(tensors),
                slopes,
                bool(given.get("retain_graph")),
                bool(given.get("create_graph")),
                (),
                allow_unreachable=True,
                accumulate_grad=True,
            )


def interpreted(run: Any) -> Any:
    """A Triton kernel in the interpreter, on the emulated device. Any operand may be written to."""

    def launch(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        operands = tensors_in((args, kwargs))
        places = {place_of(tensor) for tensor in operands}
        name = f"kernel {self.__name__}"
        if "cuda" not in places:
            run(self, *args, grid=grid, warmup=warmup, **kwargs)
            return
        if places != {"cuda"}:
            raise ValueError(f"Pointer argument cannot be accessed from Triton (cpu tensor?): {name}")
        device = emulator()
        with untouched():
            storages = [tensor.untyped_storage() for tensor in operands]
            touched = [(storage, True) for storage in storages]
            if device.capturing is None:
                device.touch(touched, name)
            elif device.has_numbers:
                device.capturing.will_write(storages)

                def again() -> None:
                    device.touch(touched, f"{name} of a graph")
                    run(self, *args, grid=grid, warmup=warmup, **kwargs)

                device.capturing.actions.append(again)
            if device.has_numbers:
                run(self, *args, grid=grid, warmup=warmup, **kwargs)

    return launch


# --- opening it


@contextmanager
def emulated(total: int = TOTAL, *, numbers: bool = True) -> Iterator[Emulator]:
    """While it is open, `cuda` is a device. Raises AssertionError at its end where anything raced."""
    from triton.runtime.interpreter import InterpretedFunction

    device = Emulator(total, numbers)
    _current.append(device)
    device.default = Stream(name="the default stream")
    run_thread = threading.Thread.run

    def in_a_thread(self: threading.Thread) -> None:
        with Operations(device), Calls(device):
            run_thread(self)

    with ExitStack() as stack:
        stack.callback(_current.pop)
        replaced = [
            *_of_torch(device),
            (InterpretedFunction, "run", interpreted(InterpretedFunction.run)),
            (threading.Thread, "run", in_a_thread),
        ]
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value, create=not hasattr(owner, name)))
        stack.enter_context(Operations(device))
        stack.enter_context(Calls(device))
        yield device
    assert not device.races, "\n".join(sorted(set(device.races)))


@contextmanager
def _on_stream(stream: Stream) -> Iterator[None]:
    device = emulator()
    before, device.current = device.current, stream
    try:
        yield
    finally:
        device.current = before


def _of_torch(device: Emulator) -> Iterator[tuple[Any, str, Any]]:
    """What stands in the place of PyTorch's functions."""
    from frugal_rl import decoder
    from frugal_rl.kernels import attention, matmul

    properties = SimpleNamespace(
        name="emulated", total_memory=device.total, multi_processor_count=16, major=8, minor=9
    )

    def limit(share: float, _: object = None) -> None:
        device.limit = int(device.total * share)

    def set_back(_: object = None) -> None:
        device.peak = device.allocated

    values: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_name": lambda *_: "emulated",
        "get_device_capability": lambda *_: (8, 9),
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (device.limit - device.allocated, device.total),
        "memory_allocated": lambda *_: device.allocated,
        "memory_reserved": lambda *_: device.allocated,
        "max_memory_allocated": lambda *_: device.peak,
        "max_memory_reserved": lambda *_: device.peak,
        "reset_peak_memory_stats": set_back,
        "set_per_process_memory_fraction": limit,
        "empty_cache": lambda: None,
        "synchronize": device.synchronize,
        "set_sync_debug_mode": lambda mode: setattr(device, "sync_mode", mode),
        "manual_seed_all": lambda _: None,
        "Stream": Stream,
        "Event": Event,
        "stream": _on_stream,
        "set_stream": lambda stream: setattr(device, "current", stream),
        "current_stream": lambda *_: device.current,
        "default_stream": lambda *_: device.default,
        "CUDAGraph": Graph,
        "graph": Capture,
        "graph_pool_handle": Pool,
        "is_current_stream_capturing": lambda: device.capturing is not None,
    }
    for name, value in values.items():
        yield torch.cuda, name, value
    yield torch._C, "_host_emptyCache", lambda: None
    if not device.has_numbers:  # kernels are not run: those for bf16 are in their places
        yield attention, "interpreted", lambda: False
        yield matmul, "interpreted", lambda: False
    make_bias = decoder.causal_lower_right

    def bias(*sizes: int) -> Any:
        with untouched():  # PyTorch makes no subclass of a tensor under a mode
            return make_bias(*sizes)

    yield decoder, "causal_lower_right", bias
    yield decoder, "SDPAParams", lambda *params: params
    yield (
        decoder,
        "can_use_flash_attention",
        lambda params: params[0].dtype in (torch.bfloat16, torch.float16),
    )
