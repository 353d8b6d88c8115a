"""Runs Python that nobody has read, in a process that can compute and print, and nothing else.

Invariants
- No network (a network namespace without devices), no file written, changed or removed (every mount
  read-only), no process that outlives it (a process namespace that ends with its first process), no
  privileges to undo any of it. CPU time, memory, open files and output are limited.
- Files can be read: keep secrets elsewhere. What is printed goes to the caller alone.
- Where the system cannot do this, it is refused: nothing runs unconfined.

Linux alone: user namespaces and mount_setattr (5.12).
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])
OUTPUT_BYTES_MAX = 1 << 20
MEMORY_BYTES = 512 << 20
REFUSED = 97  # exit code of a process that could not confine itself
_CLONE = 0x10000000 | 0x00020000 | 0x40000000 | 0x20000000 | 0x08000000  # user, mount, net, pid, ipc
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_RDONLY, _MS_PRIVATE = 1, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_CAPABILITIES_V3 = 0x20080522


class Unconfined(Exception):
    """The system cannot confine a program; the text says what it lacks."""


@dataclass(frozen=True)
class Ran:
    """`finished`: the program and its tests came to their end. `output` is cut at OUTPUT_BYTES_MAX."""

    finished: bool
    timed_out: bool
    output: str
    error: str


def run_python(program: str, tests: str, *, stdin: str = "", seconds: float) -> Ran:
    """Run a program, then tests in its names. Raises: Unconfined."""
    token = secrets.token_hex(16)
    source = (
        f"import sys; sys.path.insert(0, {PACKAGE_PARENT!r}); "
        "import frugal_rl.rewards.sandbox as s; del sys.path[0]; s.confined()"
    )
    setup = {"program": program, "tests": tests, "stdin": stdin, "token": token, "seconds": seconds}
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", source],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        env={"LC_ALL": "C.UTF-8"},
    )
    began = time.monotonic()
    try:
        raw, errors = process.communicate(json.dumps(setup).encode(), timeout=seconds)
        timed_out = process.returncode in (-signal.SIGXCPU, 128 + signal.SIGXCPU)
    except subprocess.TimeoutExpired:
        process.kill()
        raw, errors = process.communicate()
        timed_out = True
    output = raw[: OUTPUT_BYTES_MAX + len(token)].decode(errors="replace")
    error = errors[-2000:].decode(errors="replace").strip()
    if process.returncode == REFUSED:
        raise Unconfined(f"programs cannot be confined on this system: {error}")
    timed_out = timed_out or (process.returncode != 0 and time.monotonic() - began >= seconds)
    finished = process.returncode == 0 and output.endswith(token)
    return Ran(finished, timed_out, output.removesuffix(token), error)


def check() -> None:
    """Raises: Unconfined where programs cannot be confined, with what the system lacks."""
    if sys.platform != "linux":
        raise Unconfined("programs can be confined on Linux alone")
    ran = run_python("import socket", "", seconds=30.0)
    if not ran.finished:
        raise Unconfined(f"programs cannot be confined on this system: {ran.error}")


# ---- what runs inside ----


def confined() -> None:
    """Confine this process, run what standard input asks for, and print the token at its end."""
    setup: Mapping[str, Any] = json.loads(sys.stdin.buffer.read())
    try:
        child = _isolate()
    except OSError as error:
        print(f"{error.strerror} ({error.filename})", file=sys.stderr, flush=True)
        os._exit(REFUSED)
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)
    _run(setup)


def _run(setup: Mapping[str, Any]) -> NoReturn:
    import io

    token = setup["token"].encode()
    _limit(setup["seconds"])
    sys.stdin = io.TextIOWrapper(io.BytesIO(setup["stdin"].encode()))
    names = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        exec(compile(setup["program"], "answer.py", "exec"), names)
        exec(compile(setup["tests"], "tests.py", "exec"), names)
        sys.stdout.flush()
        os.write(1, token)
        os._exit(0)
    # Whatever the program raises, SystemExit too, is its failure: the last line says which.
    except BaseException as error:  # noqa: BLE001
        os.write(2, f"{type(error).__name__}: {error}"[:1000].encode(errors="replace"))
        os._exit(1)


def _isolate() -> int:
    """New namespaces, read-only mounts, no capabilities. The pid of the child that is inside, 0 in it."""
    libc = ctypes.CDLL(None, use_errno=True)

    def done(result: int, what: str) -> None:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), what)

    _die_with_parent(libc)
    done(libc.unshare(_CLONE), "unshare: user namespaces are switched off or not allowed here")
    # attr_set, attr_clr, propagation, userns_fd
    attributes = (ctypes.c_uint64 * 4)(_RDONLY, 0, _MS_PRIVATE, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    found = libc.syscall(
        _MOUNT_SETATTR, _AT_FDCWD, b"/", ctypes.c_uint(_AT_RECURSIVE), ctypes.byref(attributes), size
    )
    done(found, "mount_setattr: the file system cannot be made read-only, Linux 5.12 is needed")
    child = os.fork()
    if child:
        return child
    _die_with_parent(libc)
    os.setsid()
    done(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl: no_new_privs")
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_V3, 0)
    done(libc.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)())), "capset")
    return 0


def _die_with_parent(libc: ctypes.CDLL) -> None:
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _limit(seconds: float) -> None:
    import resource

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    for which, value in (
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_AS, mapped + MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(which)
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (most, most))
