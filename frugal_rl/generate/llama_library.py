"""llama.cpp through llama-cpp-python: a GGUF loaded once, whose tensors are changed where they lie.

Invariants: tensors lie as the file has them (no mapped file, no repacked copies), so block i of a tensor in
the file is block i in memory. A context, and its cache, lives while one batch of requests is sampled.

What is used beyond the public C interface: `llama_model::get_tensor`, exported under its C++ name, hands out
tensors by their GGUF names; libggml-base writes and reads them on any device. Every symbol is looked up
before a model is loaded, and a library that lacks one is refused by name.

Source: ggml-org/llama.cpp include/llama.h, src/llama-model.h, ggml/include/ggml-backend.h;
abetlen/llama-cpp-python llama_cpp/llama_cpp.py (its ctypes structures are used).
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FrugalError, InputError, OutOfMemory

GET_TENSOR = "_ZNK11llama_model10get_tensorEPKc"
MOST_SEQUENCES = 256  # LLAMA_MAX_SEQ
NO_MEMORY = -2  # llama_decode's status for GGML_STATUS_ALLOC_FAILED
CELLS_MULTIPLE = 256  # a sequence's cells are filled up to a multiple of so many
INSTALL = "pip install 'frugal-rl[llama]' (it is compiled, in about five minutes)"
RUN_BYTES = 1 << 16  # on a GPU: with more runs than one for so many bytes, a tensor is written whole

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Library:
    """llama-cpp-python's module, and symbols that it does not name. Raises InputError (`load`)."""

    llama: Any
    get_tensor: Any
    tensor_set: Any
    tensor_get: Any
    tensor_bytes: Any
    tensor_data: Any
    quantise: Any

    @classmethod
    def load(cls) -> Library:
        try:
            import llama_cpp
            from llama_cpp import _ctypes_extensions
            from llama_cpp import llama_cpp as module
        except ImportError as error:
            raise InputError(
                f'rollout.generator = "llama.cpp" needs llama-cpp-python ({error}): {INSTALL}; or leave '
                "the generator out"
            ) from error
        except (OSError, RuntimeError) as error:  # the shared library is broken, or for another machine
            raise InputError(
                f"llama-cpp-python does not load ({error}); build it again: {INSTALL}"
            ) from error
        base = _ctypes_extensions.load_shared_library("ggml-base", module._base_path)
        pointer, size, text = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
        found = {
            "get_tensor": _symbol(module._lib, GET_TENSOR, pointer, pointer, text),
            "tensor_set": _symbol(base, "ggml_backend_tensor_set", None, pointer, pointer, size, size),
            "tensor_get": _symbol(base, "ggml_backend_tensor_get", None, pointer, pointer, size, size),
            "tensor_bytes": _symbol(base, "ggml_nbytes", size, pointer),
            "tensor_data": _symbol(base, "ggml_get_data", pointer, pointer),
            "quantise": _symbol(
                base, "ggml_quantize_chunk", size, ctypes.c_int, pointer, pointer,
                ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, pointer,
            ),
        }  # fmt: skip
        if not hasattr(llama_cpp.llama_model_default_params(), "load_mode"):
            raise InputError(f"llama-cpp-python {llama_cpp.__version__} is older than 0.3.36: {INSTALL}")
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(_LOG, None)
        return cls(llama_cpp, **found)


def _symbol(library: Any, name: str, result: Any, *arguments: Any) -> Any:
    try:
        function = getattr(library, name)
    except AttributeError:
        raise InputError(
            f"{library._name} has no symbol {name}, by which weights are changed where they lie; install a "
            f"llama-cpp-python that has it: {INSTALL}"
        ) from None
    function.restype, function.argtypes = result, arguments
    return function


_SAID: deque[str] = deque(maxlen=4)  # the library's last lines of warning or worse: for error messages


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _LOG(level: int, text: bytes, data: Any) -> None:
    if level >= 3:  # GGML_LOG_LEVEL_WARN
        _SAID.append(text.decode(errors="replace").strip())


class LlamaModel:
    """A loaded GGUF. Raises FrugalError where llama.cpp does not load it."""

    def __init__(self, library: Library, path: Path, *, threads: int, on_gpu: bool) -> None:
        self.library, self.threads, self.on_gpu = library, threads, on_gpu
        self._blocks: dict[str, Array] = {}
        llama = library.llama
        params = llama.llama_model_default_params()
        params.n_gpu_layers = -1 if on_gpu else 0
        params.load_mode = llama.LLAMA_LOAD_MODE_NONE
        params.use_extra_bufts = False  # weights as they are in the file
        _SAID.clear()
        self.pointer = llama.llama_model_load_from_file(str(path).encode(), params)
        if not self.pointer:
            raise FrugalError(f"{path}: llama.cpp does not load it: {_said()}")
        self.close = weakref.finalize(self, llama.llama_model_free, self.pointer)  # gives its memory back
        self.vocabulary = int(llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.pointer)))

    def tensor(self, name: str) -> int:
        """A handle. Raises FrugalError where there is no such tensor."""
        handle = self.library.get_tensor(self.pointer, name.encode())
        if not handle:
            raise FrugalError(f"llama.cpp has no tensor {name}: its file was not written by this version")
        return int(handle)

    def read(self, name: str, block_bytes: int) -> Array:
        """A copy of a tensor's blocks, uint8 [N, block_bytes]."""
        handle = self.tensor(name)
        out = np.empty(self.library.tensor_bytes(handle), np.uint8)
        self.library.tensor_get(handle, out.ctypes.data, 0, out.nbytes)
        return out.reshape(-1, block_bytes)

    def write_(self, name: str, index_N: Array, block_NX: Array) -> None:
        """Change blocks by number; uint8 [N, block_bytes]."""
        block_NX, size = np.ascontiguousarray(block_NX), block_NX.shape[1]
        if not self.on_gpu:  # host memory: one call for each run of blocks would take longer than the copying
            self._in_place(name, size)[index_N] = block_NX
            return
        handle = self.tensor(name)
        total = self.library.tensor_bytes(handle)
        order_N = np.argsort(index_N)
        index_N, block_NX = index_N[order_N], block_NX[order_N]
        assert len(index_N) == 0 or (index_N[-1] + 1) * size <= total, f"{name}: a block beyond {total} bytes"
        begin_R = np.flatnonzero(np.diff(index_N, prepend=-2) != 1)
        if len(begin_R) * RUN_BYTES > total:
            whole = self.read(name, size)
            whole[index_N] = block_NX
            self.library.tensor_set(handle, whole.ctypes.data, 0, whole.nbytes)
            return
        for begin, end in zip(begin_R, [*begin_R[1:], len(index_N)], strict=True):
            part = block_NX[begin:end]
            self.library.tensor_set(handle, part.ctypes.data, int(index_N[begin]) * size, part.nbytes)

    def _in_place(self, name: str, size: int) -> Array:
        """A tensor's own memory as blocks; found once. For tensors in host memory."""
        found = self._blocks.get(name)
        if found is None:
            handle = self.tensor(name)
            data = ctypes.cast(self.library.tensor_data(handle), ctypes.POINTER(ctypes.c_uint8))
            found = np.ctypeslib.as_array(data, (self.library.tensor_bytes(handle) // size, size))
            self._blocks[name] = found
        return found

    def encode(self, code: int, value_NX: Array, block_bytes: int) -> Array:
        """float32 [N, block] as ggml encodes them, uint8 [N, block_bytes]."""
        value_NX = np.ascontiguousarray(value_NX, np.float32)
        rows, width = value_NX.shape
        out = np.empty((rows, block_bytes), np.uint8)
        self.library.quantise(code, value_NX.ctypes.data, out.ctypes.data, 0, rows, width, None)
        return out

    @contextlib.contextmanager
    def context(self, *, sequences: int, cells: int, batch_tokens: int) -> Iterator[LlamaContext]:
        """An empty cache for so many sequences of so many tokens each, until the block ends."""
        context = LlamaContext(self, sequences, cells, batch_tokens)
        try:
            yield context
        finally:
            context.close()


class LlamaContext:
    """A cache with a stream for each sequence. Raises OutOfMemory where there is no room for it."""

    def __init__(self, model: LlamaModel, sequences: int, cells: int, batch_tokens: int) -> None:
        assert sequences <= MOST_SEQUENCES, f"{sequences} sequences, llama.cpp has {MOST_SEQUENCES}"
        self.llama, self.model = model.library.llama, model
        params = self.llama.llama_context_default_params()
        params.n_ctx = sequences * -(-cells // CELLS_MULTIPLE) * CELLS_MULTIPLE
        params.n_seq_max = sequences
        params.n_batch = params.n_ubatch = batch_tokens
        params.n_outputs_max = min(batch_tokens, sequences)
        params.n_threads = params.n_threads_batch = model.threads
        params.kv_unified = False
        params.no_perf = True
        _SAID.clear()
        self.pointer = self.llama.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise OutOfMemory(
                f"llama.cpp has no context of {sequences} x {cells} tokens: {_said()}; lower memory.budget"
            )
        self.memory = self.llama.llama_get_memory(self.pointer)

    def close(self) -> None:
        self.llama.llama_free(self.pointer)

    def clear_(self, sequence: int) -> None:
        self.llama.llama_memory_seq_rm(self.memory, sequence, -1, -1)

    def copy_(self, source: int, target: int) -> None:
        """A sequence becomes another, whole."""
        self.llama.llama_memory_seq_cp(self.memory, source, target, -1, -1)

    def decode(self, token_N: Array, position_N: Array, sequence_N: Array, wanted_N: Array) -> Array:
        """Append tokens to sequences; logits [W, V] after those wanted, valid until the next call.

        `wanted_N`: bool. Raises FrugalError; OutOfMemory where that was why.
        """
        token_N, position_N, sequence_N = (
            np.ascontiguousarray(x, np.int32) for x in (token_N, position_N, sequence_N)
        )
        wanted_N = np.ascontiguousarray(wanted_N, np.int8)
        ones_N = np.ones(len(token_N), np.int32)
        address_N = sequence_N.ctypes.data + 4 * np.arange(len(token_N), dtype=np.int64)
        batch = self.llama.llama_batch(
            n_tokens=len(token_N),
            token=_pointer(token_N, ctypes.c_int32),
            embd=None,
            pos=_pointer(position_N, ctypes.c_int32),
            n_seq_id=_pointer(ones_N, ctypes.c_int32),
            seq_id=ctypes.cast(address_N.ctypes.data, ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
            logits=_pointer(wanted_N, ctypes.c_int8),
        )
        status = self.llama.llama_decode(self.pointer, batch)
        if status:
            kind = OutOfMemory if status == NO_MEMORY else FrugalError
            raise kind(f"llama.cpp did not decode {len(token_N)} tokens (status {status}): {_said()}")
        count = int(wanted_N.sum())
        if not count:
            return np.empty((0, self.model.vocabulary), np.float32)
        logits = self.llama.llama_get_logits(self.pointer)
        return np.ctypeslib.as_array(logits, (count, self.model.vocabulary))


def _pointer(array: Array, kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))


def _said() -> str:
    return "; ".join(_SAID) or "it does not say why"
