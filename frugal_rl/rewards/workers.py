"""A pool of processes that run one function on untrusted input and may be killed at any moment.

Law: every submitted payload gets exactly one Outcome, and no attempt at it takes longer than
`start + timeout_s`, whatever the function or the outside world does.

    pool --exec, once--> template (imports the function, runs the warm-up, one thread)
                            \\--fork, milliseconds--> worker <--frames--> a thread of the pool

- The template is `python -c`, a fresh interpreter: no fork of the caller, which is a trainer with
  threads and a GPU. It runs nothing but imports; a worker is a fork of it, so killing one is cheap.
- Frames are 4 bytes of big-endian length and that many bytes of JSON, on a socket of the worker's own.
- The deadline is kept by the parent: SIGKILL to the worker's process group. Nothing inside the
  worker is trusted to interrupt itself (a power of big integers holds the interpreter for minutes).
- The template reaps a worker when the pool says so: until then its pid names nothing else.
- A worker that dies while it has a payload gives the payload to a fresh one, `retries` times if it
  ended by itself, `KILLS_OUTSIDE` times if somebody killed it; then the outcome is LOST. A deadline is
  not retried. Death while starting costs the payload nothing, and a killed template is replaced.
- Ctrl-C reaches the parent only: template and workers live in their own sessions and ignore SIGINT.
- No worker outlives its work by long: an idle one ends when its parent has gone, a busy one when the
  CPU limit that it sets itself before each payload runs out. Workers are niced: the trainer goes first.
- Memory is bounded by RLIMIT_AS, over what the template has mapped, where the system keeps it.
  Over it the function sees MemoryError; that and RecursionError make the outcome EXHAUSTED.
- A process that forked while holding a pool may use it: it builds a template and workers of its own.

Differs: concurrent.futures and multiprocessing pools cannot kill one task and keep the pool;
multiprocessing "forkserver" imports the caller's main module, shares one server between all users of
a process, and does not tell who reaps a worker that was killed.
"""

from __future__ import annotations

import enum
import gc
import importlib
import json
import os
import queue
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

from frugal_rl.errors import FrugalError

PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])
MEMORY_BYTES = 1 << 30  # above what the template has; a worker for math needs 50 MiB
START_S = 60.0  # importing sympy takes 1 s, on a busy or cold machine many times that
REAP_S = 10.0  # SIGKILL to exit; memory has to be given back
FRAME_BYTES_MAX = 64 << 20
ORPHAN_CHECK_S = 5.0
KILLS_OUTSIDE = 20
NICE = 5  # a third of the processor time of a trainer that wants all of it
_ORDER = struct.Struct(">cI")  # to the template: b"F" with a socket, fork; b"R" and a pid, reap
_REPLY = struct.Struct(">q")  # the pid of the new worker, or the status of the reaped one


class Ended(enum.Enum):
    RETURNED = "returned"
    RAISED = "raised"
    EXHAUSTED = "exhausted"
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


class _Channel:
    """The parent's end of a socket. Every call raises _Deadline or _Gone; its peer is then to be killed."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        end.setblocking(False)

    def call(self, message: Any, deadline: float) -> Any:
        self.write(_frame(message), deadline)
        return self.reply(deadline)

    def reply(self, deadline: float) -> Any:
        (length_bytes,) = struct.unpack(">I", self.read(4, deadline))
        if length_bytes > FRAME_BYTES_MAX:
            raise _Gone(f"it sent a frame of {length_bytes} bytes")
        try:
            return json.loads(self.read(length_bytes, deadline))
        except ValueError as error:
            raise _Gone("it sent what is not JSON") from error

    def write(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            self._wait(select.POLLOUT, deadline)
            try:
                view = view[self.socket.send(view) :]
            except BlockingIOError:
                continue
            except OSError as error:  # the peer has gone, or close() has closed this end
                raise _Gone from error

    def read(self, length_bytes: int, deadline: float) -> bytes:
        parts = bytearray()
        while len(parts) < length_bytes:
            self._wait(select.POLLIN, deadline)
            try:
                part = self.socket.recv(min(length_bytes - len(parts), 1 << 20))
            except OSError as error:  # reset by a peer that was killed
                raise _Gone from error
            if not part:
                raise _Gone
            parts += part
        return bytes(parts)

    def _wait(self, event: int, deadline: float) -> None:
        left_s = deadline - time.monotonic()
        poll = select.poll()
        poll.register(self.socket, event)
        if left_s <= 0 or not poll.poll(left_s * 1000):
            raise _Deadline


class _Template:
    """The parent's end of the process that workers are forked from."""

    def __init__(self, setup: dict[str, Any]) -> None:
        mine, theirs = socket.socketpair()
        # The path of this package is there only while it is imported, so that it shadows nothing.
        program = (
            f"import sys; sys.path.insert(0, {PACKAGE_PARENT!r}); "
            f"import frugal_rl.rewards.workers as w; del sys.path[0]; w.serve_template({theirs.fileno()})"
        )
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        self.setup = setup
        self.ready = self.gone = False
        self._channel = _Channel(mine)
        self._lock = threading.Lock()  # one order at a time

    def prepare(self, deadline: float) -> None:
        """Wait until it is ready. Raises FrugalError with what an import or the warm-up raised."""
        reply = self._channel.call(self.setup, deadline)
        if "fatal" in reply:
            raise FrugalError(f"a worker cannot run {self.setup['target']}: {reply['fatal']}")
        self.ready = True

    def fork(self, deadline: float) -> _Worker:
        mine, theirs = socket.socketpair()
        try:
            with self._lock, theirs:
                self._channel._wait(select.POLLOUT, deadline)
                try:
                    socket.send_fds(self._channel.socket, [_ORDER.pack(b"F", 0)], [theirs.fileno()])
                except OSError as error:
                    raise _Gone from error
                (pid,) = _REPLY.unpack(self._channel.read(_REPLY.size, deadline))
        except (_Gone, _Deadline):
            mine.close()
            self.kill()
            raise
        if pid < 0:
            mine.close()
            raise FrugalError(f"the system starts no further process: {os.strerror(-pid)}")
        return _Worker(pid, self, _Channel(mine))

    def reap(self, pid: int) -> int | None:
        """The wait status of a worker that was killed or has ended; None if nobody knows."""
        try:
            with self._lock:
                if self.gone:
                    return None
                self._channel.write(_ORDER.pack(b"R", pid), time.monotonic() + REAP_S)
                (status,) = _REPLY.unpack(self._channel.read(_REPLY.size, time.monotonic() + REAP_S))
                return int(status)
        except (_Gone, _Deadline):
            self.kill()
        return None

    def kill(self) -> int:
        """Ends it; its workers go on until they are killed themselves. Returns its exit code."""
        self.gone = True
        self.process.kill()
        return self.process.wait()

    def close(self) -> None:
        self.kill()
        with self._lock:
            self._channel.socket.close()


class _Worker:
    """The parent's end of one worker."""

    def __init__(self, pid: int, template: _Template, channel: _Channel) -> None:
        self.pid, self.template, self.channel = pid, template, channel

    def signal(self) -> None:
        for kill in (os.killpg, os.kill):  # it leads no group before it is ready
            try:
                kill(self.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):  # gone already
                continue
            return

    def kill(self) -> int | None:
        """Ends it and what it started; its wait status, None if its template died before it."""
        self.signal()
        status = self.template.reap(self.pid)
        self.channel.socket.close()
        return status


class Pool:
    """`submit(payload)` gives a Future[Outcome]; payload and result are JSON. A context manager.

    `warm_up` is a payload that the template runs before it forks, so that what the function imports
    or compiles at its first call is done once and not counted against a deadline.
    """

    _template: _Template | None

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
        self.started = 0  # workers forked so far
        self.templates = 0  # templates started so far
        self._closed = False
        self._fresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pids(self) -> list[int]:
        """The workers that are there now."""
        with self._lock:
            return [worker.pid for worker in self._live]

    def template_pid(self) -> int | None:
        template = self._template
        return None if template is None or template.gone else template.process.pid

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
                    worker.signal()
            starting = self._template
            if starting is not None and not starting.ready:
                starting.process.kill()
            time.sleep(0.002)
        if self._template is not None:
            self._template.close()
            self._template = None

    def _fresh(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._live: list[_Worker] = []
        self._threads: list[threading.Thread] = []
        self._jobs: queue.SimpleQueue[tuple[Future[Outcome], Any] | None] = queue.SimpleQueue()
        self._template = None
        self._template_lock = threading.Lock()

    def _dispatch(self) -> None:
        """One thread a worker: waiting for a socket costs no interpreter time."""
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
        own_deaths = outside_deaths = 0
        while True:
            worker = worker or self._start()
            begun = time.monotonic()
            try:
                reply = worker.channel.call(payload, begun + self.timeout_s)
            except _Deadline:
                self._drop(worker)
                seconds = time.monotonic() - begun
                return None, Outcome(Ended.TIMEOUT, None, f"no result in {seconds:.1f} s", seconds)
            except _Gone as error:
                killed, why = _how(self._drop(worker))
                worker = None
                seconds = time.monotonic() - begun
                if self._closed:
                    raise CancelledError from error
                own_deaths, outside_deaths = own_deaths + (not killed), outside_deaths + killed
                if own_deaths > self.retries or outside_deaths > KILLS_OUTSIDE:
                    times = own_deaths + outside_deaths
                    detail = f"its worker died {times} times: {str(error) or why}"
                    return None, Outcome(Ended.LOST, None, detail, seconds)
                continue
            except (TypeError, ValueError):
                self._drop(worker)
                raise
            seconds = time.monotonic() - begun
            for ended in (Ended.RAISED, Ended.EXHAUSTED):
                if ended.value in reply:
                    return worker, Outcome(ended, None, reply[ended.value], seconds)
            return worker, Outcome(Ended.RETURNED, reply["value"], "", seconds)

    def _start(self) -> _Worker:
        deadline = time.monotonic() + START_S
        while True:
            try:
                worker = self._ready_template(deadline).fork(deadline)
            except _Gone:
                continue  # the template was killed: _ready_template starts another
            except _Deadline as error:
                raise FrugalError(f"a worker for {self.target} was not ready in {START_S:.0f} s") from error
            with self._lock:
                self.started += 1
                self._live.append(worker)
            try:
                worker.channel.reply(deadline)
                return worker
            except _Deadline as error:
                self._drop(worker)
                raise FrugalError(f"a worker for {self.target} was not ready in {START_S:.0f} s") from error
            except _Gone as error:
                killed, why = _how(self._drop(worker))
                if self._closed:
                    raise CancelledError from error
                if not killed:
                    raise FrugalError(f"a worker for {self.target} ends as it starts: {why}") from error

    def _ready_template(self, deadline: float) -> _Template:
        with self._template_lock:
            while True:
                if self._closed:
                    raise CancelledError
                template = self._template
                if template is not None and not template.gone and template.process.poll() is None:
                    return template
                if template is not None:
                    template.close()
                self._template = template = _Template(
                    {
                        "target": self.target,
                        "timeout_s": self.timeout_s,
                        "memory_bytes": self.memory_bytes,
                        "warm_up": self.warm_up,
                    }
                )
                self.templates += 1
                try:
                    template.prepare(deadline)
                    return template
                except (_Deadline, FrugalError):
                    self._template = None
                    template.close()
                    raise
                except _Gone as error:
                    code = template.process.wait()
                    if not self._closed and code != -signal.SIGKILL:
                        raise FrugalError(
                            f"a worker for {self.target} ends as it starts: {_how(code)[1]}"
                        ) from error

    def _drop(self, worker: _Worker) -> int | None:
        """Its exit code, as subprocess has them; None if unknown."""
        with self._lock:
            self._live.remove(worker)
        status = worker.kill()
        return None if status is None else os.waitstatus_to_exitcode(status)


def _how(code: int | None) -> tuple[bool, str]:
    """Whether an exit code tells of a kill from outside, and what it tells."""
    if code is None:
        return True, "killed with its template"
    if code == -signal.SIGKILL:
        return True, "killed by signal 9"
    return False, f"killed by signal {-code}" if code < 0 else f"exit code {code}"


# ---- what runs in the template and in its workers ----


def serve_template(control_fd: int) -> None:
    """The template's whole life: import, warm up, then fork and reap as it is told."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()
    control = socket.socket(fileno=control_fd)
    setup = _next_request(control, parent)
    if setup is None:
        return
    try:
        os.nice(NICE)
        function = resolve(setup["target"])
        if setup["warm_up"] is not None:
            function(setup["warm_up"])
        if threading.active_count() > 1:
            raise RuntimeError("its import starts threads, which no fork keeps: start them when called")
    except BaseException as error:  # noqa: BLE001 - whatever an import raises, the parent is told and stops
        control.sendall(_frame({"fatal": f"{type(error).__name__}: {error}"[:2000]}))
        return
    gc.collect()
    gc.freeze()  # what is imported stays shared between the forks
    control.sendall(_frame({"ready": os.getpid()}))
    while (order := _next_order(control, parent)) is not None:
        kind, pid, fds = order
        if kind == b"R":
            control.sendall(_REPLY.pack(os.waitpid(pid, 0)[1]))
            continue
        try:
            child = os.fork()
        except OSError as error:
            child = -(error.errno or 1)
        if child == 0:
            control.close()
            _serve(socket.socket(fileno=fds[0]), function, setup, parent)
        os.close(fds[0])
        control.sendall(_REPLY.pack(child))


def _serve(channel: socket.socket, function: Callable[[Any], Any], setup: Any, parent: int) -> NoReturn:
    """A worker's whole life. It leaves without the template's exit handlers."""
    try:
        os.setsid()
        random.seed()
        _limit("RLIMIT_AS", _mapped_bytes() + setup["memory_bytes"])
        channel.sendall(_frame({"ready": os.getpid()}))
        while (payload := _next_request(channel, parent)) is not None:
            used_s = time.process_time()
            _limit("RLIMIT_CPU", int(used_s + 2 * setup["timeout_s"]) + 2)
            channel.sendall(_answer(function, payload))
    finally:
        os._exit(0)


def _answer(function: Callable[[Any], Any], payload: Any) -> bytes:
    try:
        return _frame({"value": function(payload)})
    # Whatever the function raises is its result; SystemExit and math-verify's timeout are no Exceptions.
    except BaseException as error:  # noqa: BLE001
        ended = Ended.EXHAUSTED if isinstance(error, MemoryError | RecursionError) else Ended.RAISED
        return _frame({ended.value: f"{type(error).__name__}: {error}"[:500]})


def resolve(target: str) -> Callable[[Any], Any]:
    """The function called "module:name"."""
    module, _, name = target.partition(":")
    function: Callable[[Any], Any] = getattr(importlib.import_module(module), name)
    return function


def _arrived(channel: socket.socket, parent: int) -> bool:
    """Waits for bytes; False when the parent has died while a fork of it holds the socket open."""
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    while not poll.poll(ORPHAN_CHECK_S * 1000):
        try:
            os.kill(parent, 0)
        except OSError:  # it has gone, or its pid is a stranger's
            return False
    return True


def _next_order(control: socket.socket, parent: int) -> tuple[bytes, int, list[int]] | None:
    if not _arrived(control, parent):
        return None
    data, fds, _, _ = socket.recv_fds(control, _ORDER.size, 1)
    if not data:
        return None
    rest = _read_all(control, _ORDER.size - len(data))
    return None if rest is None else (*_ORDER.unpack(data + rest), fds)


def _next_request(channel: socket.socket, parent: int) -> Any | None:
    """None when the parent has closed the socket or has gone."""
    if not _arrived(channel, parent):
        return None
    header = _read_all(channel, 4)
    if header is None:
        return None
    body = _read_all(channel, struct.unpack(">I", header)[0])
    return None if body is None else json.loads(body)


def _read_all(channel: socket.socket, length_bytes: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < length_bytes:
        part = channel.recv(length_bytes - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


def _mapped_bytes() -> int:
    """The address space in use; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    except OSError:  # not Linux
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


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
