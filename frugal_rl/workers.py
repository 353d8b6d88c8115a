"""A pool of processes that run one function on untrusted input and may be killed at any moment.

Law: every submitted payload gets exactly one Outcome, and none takes longer than
`(retries + 1) * (start + timeout_s)`, whatever the function or the outside world does.

- A worker is `python -c` running `serve()` below, started when its first payload is there. It
  imports one function ("module:name"), says that it is ready, then answers one payload at a time.
  Frames on its pipes are 4 bytes of big-endian length and that many bytes of JSON.
- The deadline is kept by the parent: SIGKILL to the worker's process group. Nothing inside the
  worker is trusted to interrupt itself (a power of big integers holds the interpreter for minutes).
- A worker that dies while it has a payload gives the payload to a fresh one, `retries` times, then
  the outcome is LOST. A deadline is not retried. Death while starting costs the payload nothing.
- Ctrl-C reaches the parent only: workers live in their own session and ignore SIGINT.
- No worker outlives its work by long: an idle one ends when its parent has gone, a busy one when the
  CPU limit that it sets itself before each payload runs out.
- Memory is bounded by RLIMIT_AS where the system keeps it; over it, the function sees MemoryError.
- A process that forked while holding a pool may use it: it builds threads and workers of its own.

Differs: concurrent.futures and multiprocessing pools cannot kill one task and keep the pool, and
multiprocessing "spawn" imports the caller's main module, which here is a trainer with torch in it.
"""

from __future__ import annotations

import enum
import importlib
import json
import os
import queue
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from frugal_rl.errors import FrugalError

PACKAGE_PARENT = str(Path(__file__).resolve().parent.parent)
MEMORY_BYTES = 1 << 30  # a worker with sympy and math-verify has 75 MiB
START_S = 60.0  # importing sympy takes 1 s, on a busy or cold machine many times that
FRAME_BYTES_MAX = 64 << 20
ORPHAN_CHECK_S = 5.0


class Ended(enum.Enum):
    RETURNED = "returned"
    RAISED = "raised"
    TIMEOUT = "timeout"
    LOST = "lost"


@dataclass(frozen=True)
class Outcome:
    """`value` is the function's JSON result if it RETURNED; `seconds` are those of the last attempt."""

    ended: Ended
    value: Any
    detail: str
    seconds: float


class _Deadline(Exception):
    pass


class _Gone(Exception):
    pass


def _frame(message: Any) -> bytes:
    body = json.dumps(message).encode()
    return struct.pack(">I", len(body)) + body


class _Worker:
    """The parent's end of one process."""

    def __init__(self, setup: dict[str, Any]) -> None:
        # The path of this package is there only while it is imported, so that it shadows nothing.
        program = (
            f"import sys; sys.path.insert(0, {PACKAGE_PARENT!r}); "
            "import frugal_rl.workers as w; del sys.path[0]; w.serve()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        os.set_blocking(self.stdin.fileno(), False)
        self.setup = setup

    def call(self, message: Any, limit_s: float) -> Any:
        """Raises _Deadline or _Gone; the worker is then to be killed."""
        deadline = time.monotonic() + limit_s
        self._write(_frame(message), deadline)
        (length_bytes,) = struct.unpack(">I", self._read(4, deadline))
        if length_bytes > FRAME_BYTES_MAX:
            raise _Gone(f"it sent a frame of {length_bytes} bytes")
        try:
            return json.loads(self._read(length_bytes, deadline))
        except ValueError as error:
            raise _Gone("it sent what is not JSON") from error

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # gone already
            self.process.kill()
        self.process.wait()
        self.stdin.close()
        self.stdout.close()

    def why_gone(self) -> str:
        try:
            code = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    @staticmethod
    def _wait(fd: int, event: int, deadline: float) -> None:
        left_s = deadline - time.monotonic()
        poll = select.poll()
        poll.register(fd, event)
        if left_s <= 0 or not poll.poll(left_s * 1000):
            raise _Deadline

    def _write(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            self._wait(self.stdin.fileno(), select.POLLOUT, deadline)
            try:
                view = view[os.write(self.stdin.fileno(), view) :]
            except BlockingIOError:
                continue
            except BrokenPipeError as error:
                raise _Gone from error

    def _read(self, length_bytes: int, deadline: float) -> bytes:
        parts = bytearray()
        while len(parts) < length_bytes:
            self._wait(self.stdout.fileno(), select.POLLIN, deadline)
            part = os.read(self.stdout.fileno(), min(length_bytes - len(parts), 1 << 20))
            if not part:
                raise _Gone
            parts += part
        return bytes(parts)


class Pool:
    """`submit(payload)` gives a Future[Outcome]; payload and result are JSON. A context manager.

    `warm_up` is a payload that each worker runs before it is ready, so that what the function imports
    or compiles at its first call is not counted against a deadline.
    """

    def __init__(
        self,
        target: str,
        *,
        workers: int,
        timeout_s: float,
        memory_bytes: int = MEMORY_BYTES,
        retries: int = 1,
        warm_up: Any = None,
    ) -> None:
        self.target, self.workers, self.timeout_s = target, workers, timeout_s
        self.memory_bytes, self.retries = memory_bytes, retries
        self.warm_up = warm_up
        self.started = 0  # processes started so far
        self._closed = False
        self._fresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pids(self) -> list[int]:
        """The processes that are there now."""
        with self._lock:
            return [worker.process.pid for worker in self._live]

    def submit(self, payload: Any) -> Future[Outcome]:
        """Raises (from the future): FrugalError if workers cannot start at all."""
        if self._closed:
            raise RuntimeError("the pool is closed")
        if os.getpid() != self._pid:  # a fork copies no threads, and the workers are the parent's
            self._fresh()
        future: Future[Outcome] = Future()
        self._jobs.put((future, payload))
        if len(self._threads) < self.workers:
            thread = threading.Thread(target=self._dispatch, daemon=True, name="frugal_rl worker")
            self._threads.append(thread)
            thread.start()
        return future

    def close(self) -> None:
        """Kills the workers; what is not answered by now is cancelled. May be called twice."""
        self._closed = True
        if os.getpid() != self._pid:
            return
        for _ in self._threads:
            self._jobs.put(None)
        while any(thread.is_alive() for thread in self._threads):
            with self._lock:
                for worker in self._live:
                    worker.process.kill()
            time.sleep(0.002)

    def _fresh(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._live: list[_Worker] = []
        self._threads: list[threading.Thread] = []
        self._jobs: queue.SimpleQueue[tuple[Future[Outcome], Any] | None] = queue.SimpleQueue()

    def _dispatch(self) -> None:
        """One thread a worker: waiting for a pipe costs no interpreter time."""
        worker: _Worker | None = None
        while (job := self._jobs.get()) is not None:
            future, payload = job
            if self._closed or not future.set_running_or_notify_cancel():
                future.cancel()
                continue
            try:
                worker, outcome = self._attempts(worker, payload)
                future.set_result(outcome)
            except (FrugalError, CancelledError, OSError, TypeError, ValueError) as error:
                worker = None  # TypeError, ValueError: the payload is not JSON; OSError: no process
                future.set_exception(error)
        if worker is not None:
            self._drop(worker)

    def _attempts(self, worker: _Worker | None, payload: Any) -> tuple[_Worker | None, Outcome]:
        seconds = 0.0
        why = ""
        for _ in range(self.retries + 1):
            worker = worker or self._start()
            begun = time.monotonic()
            try:
                reply = worker.call(payload, self.timeout_s)
            except _Deadline:
                self._drop(worker)
                seconds = time.monotonic() - begun
                return None, Outcome(Ended.TIMEOUT, None, f"no result in {seconds:.1f} s", seconds)
            except _Gone as error:
                why = str(error) or worker.why_gone()
                self._drop(worker)
                worker = None
                seconds = time.monotonic() - begun
                if self._closed:
                    raise CancelledError from error
                continue
            except (TypeError, ValueError):
                self._drop(worker)
                raise
            seconds = time.monotonic() - begun
            if "raised" in reply:
                return worker, Outcome(Ended.RAISED, None, reply["raised"], seconds)
            return worker, Outcome(Ended.RETURNED, reply["value"], "", seconds)
        tries = self.retries + 1
        return None, Outcome(Ended.LOST, None, f"its worker died {tries} times: {why}", seconds)

    def _start(self) -> _Worker:
        deadline = time.monotonic() + START_S
        while True:
            worker = _Worker(
                {
                    "target": self.target,
                    "timeout_s": self.timeout_s,
                    "memory_bytes": self.memory_bytes,
                    "warm_up": self.warm_up,
                }
            )
            with self._lock:
                self.started += 1
                self._live.append(worker)
            try:
                reply = worker.call(worker.setup, deadline - time.monotonic())
            except _Deadline as error:
                self._drop(worker)
                raise FrugalError(f"a worker for {self.target} was not ready in {START_S:.0f} s") from error
            except _Gone as error:
                why = worker.why_gone()
                self._drop(worker)
                if self._closed:
                    raise CancelledError from error
                if not why.startswith("killed"):  # a kill from outside is worth another start
                    raise FrugalError(f"a worker for {self.target} ends as it starts: {why}") from error
                continue
            if "fatal" in reply:
                self._drop(worker)
                raise FrugalError(f"a worker cannot run {self.target}: {reply['fatal']}")
            return worker

    def _drop(self, worker: _Worker) -> None:
        with self._lock:
            self._live.remove(worker)
        worker.kill()


# ---- what runs in the worker ----


def serve() -> None:
    """A worker's whole life. Standard output is the protocol's: what the function prints is lost."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, replies = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    parent = os.getppid()
    setup = _next_request(requests, parent)
    if setup is None:
        return
    try:
        function = resolve(setup["target"])
        if setup["warm_up"] is not None:
            function(setup["warm_up"])
    except Exception as error:  # noqa: BLE001 - whatever an import raises, the parent is told and stops
        _reply(replies, {"fatal": f"{type(error).__name__}: {error}"})
        return
    _limit("RLIMIT_AS", setup["memory_bytes"])
    _reply(replies, {"ready": os.getpid()})
    while (payload := _next_request(requests, parent)) is not None:
        used_s = time.process_time()
        _limit("RLIMIT_CPU", int(used_s + 2 * setup["timeout_s"]) + 2)
        try:
            reply = {"value": function(payload)}
            frame = _frame(reply)
        # Whatever the function raises is its result; SystemExit and math-verify's timeout are no Exceptions.
        except BaseException as error:  # noqa: BLE001
            frame = _frame({"raised": f"{type(error).__name__}: {error}"[:500]})
        _write_all(replies, frame)


def resolve(target: str) -> Callable[[Any], Any]:
    """The function called "module:name"."""
    module, _, name = target.partition(":")
    function: Callable[[Any], Any] = getattr(importlib.import_module(module), name)
    return function


def _next_request(fd: int, parent: int) -> Any | None:
    """None when the parent has closed the pipe, or has died while a fork of it holds the pipe open."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while not poll.poll(ORPHAN_CHECK_S * 1000):
        if os.getppid() != parent:
            return None
    header = _read_all(fd, 4)
    if header is None:
        return None
    body = _read_all(fd, struct.unpack(">I", header)[0])
    return None if body is None else json.loads(body)


def _read_all(fd: int, length_bytes: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < length_bytes:
        part = os.read(fd, length_bytes - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


def _reply(fd: int, message: Any) -> None:
    _write_all(fd, _frame(message))


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _limit(name: str, value: int) -> None:
    """Lowers a soft limit of this process where the system has it."""
    try:
        import resource
    except ImportError:  # not a POSIX system
        return
    which = getattr(resource, name, None)
    if which is None:
        return
    _, hard = resource.getrlimit(which)
    soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(which, (soft, hard))
    except (ValueError, OSError):  # macOS refuses RLIMIT_AS
        return
