"""workers.py: every payload gets its outcome, whoever hangs, dies, is killed or forks."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from frugal_rl.errors import FrugalError
from frugal_rl.rewards.workers import NICE, Ended, Pool

ROOT = Path(__file__).resolve().parent.parent
SLACK_S = 2.0  # a busy machine wakes the parent this much late


def double(payload: int) -> int:
    return 2 * payload


def misbehave(payload: str) -> object:
    if payload == "die":
        os._exit(3)
    if payload == "hang":
        time.sleep(60)
    if payload == "raise":
        raise SystemExit("no")
    if payload == "print":
        print("noise on standard output", flush=True)
    if payload == "greedy":
        return len(bytearray(4 << 30))
    if payload == "deep":
        return misbehave_deeply(0)
    if payload == "dice":
        return random.random()
    if payload == "nice":
        return os.nice(0)
    if payload == "unspeakable":
        return object()
    return os.getpid()


def misbehave_deeply(depth: int) -> int:
    return 1 + misbehave_deeply(depth + 1)


@pytest.fixture(autouse=True)
def workers_find_this_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def pool(target: str = "misbehave", **options: float) -> Pool:
    return Pool(f"test_workers:{target}", **{"workers": 1, "timeout_s": 20.0, **options})  # type: ignore[arg-type]


def test_every_payload_gets_its_own_outcome() -> None:
    with pool("double", workers=2) as two:
        outcomes = [f.result() for f in [two.submit(i) for i in range(200)]]
        assert [o.value for o in outcomes] == [2 * i for i in range(200)]
        assert two.started == 2


def test_a_hang_is_killed_at_the_deadline_and_the_next_payload_gets_a_new_worker() -> None:
    with pool(timeout_s=0.5) as one:
        first = one.submit("pid").result().value
        begun = time.monotonic()
        assert one.submit("hang").result().ended is Ended.TIMEOUT
        assert time.monotonic() - begun < 0.5 + SLACK_S
        second = one.submit("pid").result().value
        assert second != first
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)


def test_what_a_function_raises_prints_or_cannot_return_is_told_and_the_worker_lives_on() -> None:
    with pool() as one:
        pid = one.submit("pid").result().value
        raised = one.submit("raise").result()
        assert (raised.ended, raised.detail) == (Ended.RAISED, "SystemExit: no")
        assert one.submit("print").result().value == pid
        assert "not JSON serializable" in one.submit("unspeakable").result().detail
        assert one.submit("deep").result().ended is Ended.EXHAUSTED
        if sys.platform == "linux":
            greedy = one.submit("greedy").result()
            assert greedy.ended is Ended.EXHAUSTED and "MemoryError" in greedy.detail
        assert one.submit("pid").result().value == pid and one.started == 1


def test_a_worker_that_dies_gets_one_more_try_then_the_payload_is_lost() -> None:
    with pool() as one:
        lost = one.submit("die").result()
        assert lost.ended is Ended.LOST and "died 2 times: exit code 3" in lost.detail
        assert one.started == 2
        assert one.submit("pid").result().ended is Ended.RETURNED


def test_a_function_that_is_not_there_stops_with_its_name() -> None:
    with (
        pool("nothing") as one,
        pytest.raises(FrugalError, match=r"test_workers:nothing: AttributeError"),
    ):
        one.submit(1).result()


def test_closing_kills_workers_at_once_and_cancels_what_waits() -> None:
    one = pool(timeout_s=60.0)
    pid = one.submit("pid").result().value
    waiting = [one.submit("hang") for _ in range(3)]
    time.sleep(0.2)
    begun = time.monotonic()
    one.close()
    one.close()
    assert time.monotonic() - begun < SLACK_S
    assert all(future.cancelled() or future.exception() for future in waiting)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(RuntimeError, match=r"closed"):
        one.submit("pid")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_process_that_forks_late_goes_on_with_workers_of_its_own() -> None:
    done = run_python("""
        import os
        from frugal_rl.rewards.workers import Pool
        pool = Pool("test_workers:misbehave", workers=1, timeout_s=20)
        mine = pool.submit("pid").result().value
        child = os.fork()
        if child == 0:
            other = pool.submit("pid").result().value
            pool.close()
            os._exit(0 if other != mine else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert pool.submit("pid").result().value == mine
        pool.close()
    """)
    assert done.returncode == 0, done.stderr


def test_ctrl_c_reaches_the_parent_and_leaves_no_worker_behind() -> None:
    done = run_python("""
        import os, signal, threading
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
        from frugal_rl.rewards.workers import Pool
        with Pool("test_workers:misbehave", workers=1, timeout_s=50) as pool:
            pid = pool.submit("pid").result().value
            assert os.getsid(pid) != os.getsid(0)
            os.kill(pid, signal.SIGINT)
            assert pool.submit("pid").result().value == pid
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            try:
                pool.submit("hang").result()
                raise SystemExit("not interrupted")
            except KeyboardInterrupt:
                pass
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            print("clean")
    """)
    assert done.stdout == "clean\n", done.stderr


def test_a_worker_ends_when_its_parent_is_killed() -> None:
    done = run_python("""
        import os, signal
        from frugal_rl.rewards.workers import Pool
        pool = Pool("test_workers:misbehave", workers=1, timeout_s=50)
        print(pool.submit("pid").result().value, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    deadline = time.monotonic() + 10
    while True:
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill_template(one: Pool) -> None:
    pid = one.template_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def test_a_template_killed_from_outside_is_replaced_and_its_workers_go_on() -> None:
    with pool() as one:
        pid = one.submit("pid").result().value
        kill_template(one)
        assert one.submit("pid").result().value == pid
        os.kill(pid, signal.SIGKILL)
        other = one.submit("pid").result()
        assert other.ended is Ended.RETURNED and other.value != pid
        assert (one.started, one.templates) == (2, 2)


def test_killing_a_worker_costs_a_fork_and_no_import() -> None:
    with pool() as one:
        one.submit("pid").result()
        for _ in range(30):
            os.kill(one.pids()[0], signal.SIGKILL)
            assert one.submit("pid").result().ended is Ended.RETURNED
        assert one.templates == 1 and one.started >= 30


def test_workers_draw_numbers_of_their_own_and_step_aside_for_the_trainer() -> None:
    with pool(timeout_s=0.5) as one:
        first = one.submit("dice").result().value
        one.submit("hang").result()
        assert one.submit("dice").result().value != first
        assert one.submit("nice").result().value == min(19, os.nice(0) + NICE)


def test_a_module_that_starts_threads_as_it_is_imported_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "def f(x): return x\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with (
        Pool("threaded:f", workers=1, timeout_s=5.0) as one,
        pytest.raises(FrugalError, match="starts threads"),
    ):
        one.submit(1).result()


def test_5000_outcomes_arrive_in_order_while_workers_and_the_template_are_killed() -> None:
    over = threading.Event()
    killed = 0
    with pool("double", workers=2) as two:
        two.submit(0).result()

        def chaos() -> None:
            nonlocal killed
            source = random.Random(0)
            while not over.wait(0.02):
                targets = [*two.pids(), two.template_pid()] if killed % 10 == 9 else two.pids()
                pid = source.choice(targets) if targets else None
                if pid is not None:
                    try:
                        os.kill(pid, signal.SIGKILL)
                        killed += 1
                    except ProcessLookupError:  # just replaced
                        continue

        thread = threading.Thread(target=chaos)
        thread.start()
        try:
            done = 0
            while done < 5000 or killed < 20:  # as many as it takes to be killed often
                outcomes = [f.result() for f in [two.submit(i) for i in range(1000)]]
                assert [o.value for o in outcomes] == [2 * i for i in range(1000)]
                done += 1000
        finally:
            over.set()
            thread.join()
        assert two.started > 10
