"""sandbox.py: programs compute and print, and do nothing else; code is judged by its tests."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from frugal_rl.errors import InputError
from frugal_rl.reward import Verifier
from frugal_rl.rewards.answers import Verdict
from frugal_rl.rewards.sandbox import Unconfined, check, run_python
from frugal_rl.rewards.verifiers import code

try:
    check()
    LACKING = ""
except Unconfined as error:
    LACKING = str(error)
confined = pytest.mark.skipif(bool(LACKING), reason=LACKING)
C, W, N, T = Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER, Verdict.TIMEOUT
PLENTY_S = 60.0  # for a program that needs none of it


@confined
def test_a_program_computes_and_prints() -> None:
    ran = run_python("print(int(input()) * 2)", "", stdin="21\n", seconds=PLENTY_S)
    assert (ran.finished, ran.output, ran.error) == (True, "42\n", "")


@confined
@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "Error"),
        ("open('FILE', 'w')", "Read-only file system"),
        ("import os; os.remove('FILE')", "Read-only file system"),
        ("import os; os.chmod('FILE', 0o777)", "Read-only file system"),
        ("open('/dev/shm/x', 'w')", "Error"),
        ("x = bytearray(4 << 30)", "MemoryError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os; os._exit(0)", ""),
        ("def f(", "SyntaxError"),
        ("def f(): return f()\nf()", "RecursionError"),
    ],
)
def test_it_does_nothing_else(program: str, why: str, tmp_path: Path) -> None:
    file = tmp_path / "kept"
    file.write_text("kept")
    ran = run_python(program.replace("FILE", str(file)), "", seconds=PLENTY_S)
    assert not ran.finished
    assert why in ran.error
    assert file.read_text() == "kept" and file.stat().st_mode & 0o777 != 0o777


@confined
def test_privileges_do_not_come_back() -> None:
    program = """
import ctypes
libc = ctypes.CDLL(None)
attributes = (ctypes.c_uint64 * 4)(0, 1, 0, 0)
assert libc.unshare(0x10000000 | 0x20000) in (0, -1)
assert libc.syscall(442, -100, b"/", 0x8000, ctypes.byref(attributes), 32) == -1
"""
    ran = run_python(program, "", seconds=PLENTY_S)
    assert ran.finished, ran.error


@confined
def test_what_hangs_is_ended_with_all_its_children() -> None:
    mark = f"sleeper-{os.getpid()}-{time.monotonic_ns()}"
    program = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)', {mark!r}])\n"
        "time.sleep(300)"
    )
    ran = run_python(program, "", seconds=2.0)
    assert ran.timed_out and not ran.finished
    deadline = time.monotonic() + 20
    while any(mark.encode() in line for line in command_lines()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def command_lines() -> list[bytes]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:  # it ended meanwhile
            continue
    return found


def fenced(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\nDone."


@confined
@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        (fenced("def add(a, b):\n    return a + b"), C),
        (fenced("def add(a, b):\n    return a - b"), W),
        (fenced("import os\nos._exit(0)"), W),
        (fenced("def add(a, b): return 0") + fenced("def add(a, b): return a + b"), C),
        ("<answer>def add(a, b): return a + b</answer>", C),
        ("def add(a, b): return a + b", N),
    ],
)
def test_code_is_judged_by_its_tests(response: str, verdict: Verdict) -> None:
    problem = {"tests": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]}
    assert code(problem, response, str(PLENTY_S))[0] is verdict


@confined
def test_code_is_judged_by_what_it_prints() -> None:
    problem = {"tests": [{"input": "1 2", "output": "3"}, {"input": "5 5", "output": "10\n"}]}
    good = fenced("print(sum(map(int, input().split())))")
    assert code(problem, good, str(PLENTY_S))[0] is C
    verdict, why = code(problem, fenced("print(3)"), str(PLENTY_S))
    assert verdict is W and "test 2: it printed '3\\n', not '10\\n'" in why
    assert code(problem, fenced("while True: pass"), "1")[0] is T
    with pytest.raises(ValueError, match="no tests"):
        code({}, good)


@confined
def test_code_as_a_reward_needs_time_below_the_deadline_of_its_worker() -> None:
    with pytest.raises(InputError, match=r"reward code\(6\): expected .* less than timeout_s = 5"):
        Verifier("code(6)")


def test_where_nothing_can_be_confined_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(InputError, match=r"reward code.*Linux alone"):
        Verifier("code")
