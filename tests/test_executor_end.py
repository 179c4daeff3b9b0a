"""The end of an Executor: shutdown, dropped, with the interpreter."""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import wait

import pytest

import afork

from .conftest import HANG, SCRIPTS
from .scripts import executor_tools, pool_tools
from .scripts.executor_tools import ends, joined, results

gate, jobs = pool_tools.gate, pool_tools.jobs  # fixtures
events = executor_tools.events


# -- the end


@pytest.mark.parametrize("used", [True, False])
def test_submit_after_shutdown(jobs, used):
    executor = afork.Executor(1)
    if used:
        assert executor.submit(jobs.add, 1).result(HANG) == 1
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(jobs.add, 1)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.map(jobs.add, [1])
    executor.shutdown()  # and again
    with executor:
        pass


def test_shutdown_waits_for_what_is_open(jobs):
    with afork.Executor(2) as executor:
        fs = [executor.submit(jobs.add, i) for i in range(50)]
        thread = executor._thread.thread
    assert all(f.done() for f in fs)
    assert results(fs) == list(range(50))
    assert not thread.is_alive()
    assert executor._pool.stats().pids == ()


def test_shutdown_without_waiting(jobs, gate, events):
    executor = afork.Executor(1, on_event=events)
    fs = [executor.submit(jobs.hold, gate.path, i) for i in range(3)]
    events.held()
    executor.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(jobs.add, 1)
    assert not fs[0].done()
    gate.open(3)
    assert results(fs) == [0, 1, 2]
    assert joined(executor._thread.thread)


@pytest.mark.parametrize("late", [True, False])
def test_shutdown_cancels_what_waits(jobs, gate, events, late):
    executor = afork.Executor(1, on_event=events)
    fs = [executor.submit(jobs.hold, gate.path, i) for i in range(10)]
    events.held()
    if late:
        executor.shutdown(wait=False)
    executor.shutdown(wait=False, cancel_futures=True)
    done, _ = wait(fs[1:], HANG)
    assert done == set(fs[1:])
    assert all(f.cancelled() for f in fs[1:])
    assert not fs[0].done()
    gate.open()
    executor.shutdown()
    assert fs[0].result(HANG) == 0


def test_shutdown_at_once_with_cancel_futures(jobs):
    """None of them has a process yet."""
    executor = afork.Executor(1)
    fs = [executor.submit(jobs.add, i) for i in range(10)]
    executor.shutdown(cancel_futures=True)
    assert all(f.done() for f in fs)


def test_leaving_with_an_error_finishes_what_is_open(jobs):
    """As the standard executors do."""

    def fail():
        with afork.Executor(1) as executor:
            found.append(executor.submit(jobs.add, 1))
            raise LookupError

    found = []
    with pytest.raises(LookupError):
        fail()
    assert found[0].result(0) == 1


def test_submit_races_with_shutdown(jobs):
    """Who has got a future gets an answer."""
    for i in range(10):
        executor = afork.Executor(1)
        executor.submit(abs, 1).result(HANG)
        start = threading.Barrier(4)
        got = []

        def work(executor=executor, start=start, got=got):
            start.wait(HANG)
            with contextlib.suppress(RuntimeError):
                while True:
                    got.append(executor.submit(abs, 1))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        start.wait(HANG)
        executor.shutdown(wait=i % 2 == 0, cancel_futures=i % 3 == 0)
        assert all(joined(thread) for thread in threads)
        done, open_ = wait(got, HANG)
        assert not open_
        assert all(f.cancelled() or f.result() == 1 for f in done)
        executor.shutdown()


def test_shutdown_in_a_callback(jobs):
    executor = afork.Executor(1)
    raised = queue.SimpleQueue()

    def callback(future):
        try:
            executor.shutdown()
        except BaseException as exc:
            raised.put(exc)
        else:
            raised.put(None)

    future = executor.submit(jobs.add, 1)
    thread = executor._thread.thread
    future.add_done_callback(callback)
    assert raised.get(timeout=HANG) is None
    assert joined(thread)


def test_dropped_without_shutdown(jobs, gate, events):
    executor = afork.Executor(1, on_event=events)
    fs = [executor.submit(jobs.hold, gate.path, i) for i in range(3)]
    events.held()
    thread, pool = executor._thread.thread, executor._pool
    gone = weakref.ref(executor)
    del executor
    gc.collect()
    assert gone() is None
    gate.open(3)
    assert results(fs) == [0, 1, 2]
    assert joined(thread)
    assert pool.stats().pids == ()


def test_dropped_in_its_own_thread(jobs):
    executor = afork.Executor(1)
    held = [executor]
    future = executor.submit(jobs.add, 1)
    thread = executor._thread.thread
    del executor
    future.add_done_callback(lambda _: held.clear())
    assert future.result(HANG) == 1
    assert joined(thread)
    assert not held


# -- the end of the interpreter


def test_exit_finishes_what_is_open(run_script):
    done = run_script(
        """
import atexit, sys, threading
import afork

def late():
    try:
        executor.submit(abs, -1)
    except RuntimeError as exc:
        print("late:", exc)

atexit.register(late)
executor = afork.Executor(1)
shut = afork.Executor(1)
other = shut.submit(pow, 7, 2)
shut.shutdown(wait=False)
futures = [executor.submit(pow, i, 2) for i in range(20)]
futures[-1].add_done_callback(lambda f: print("last:", f.result(), flush=True))

def work():
    try:
        while True:
            futures.append(executor.submit(pow, 2, 2))
            futures[-1].result()
    except RuntimeError as exc:
        assert all(f.result(10) is not None for f in futures)
        print("thread:", exc, other.result(10))

threading.Thread(target=work).start()
sys.exit(3)
""",
        status=3,
    )
    assert sorted(done.stdout.splitlines()) == [
        "last: 361",
        "late: cannot schedule new futures after interpreter shutdown",
        "thread: cannot schedule new futures after interpreter shutdown 49",
    ]
    assert done.stderr == ""


def test_exit_with_an_executor_never_used(run_script):
    done = run_script("import afork\nexecutor = afork.Executor(1)\n")
    assert done.stderr == ""


def test_exit_of_a_thread_pool_that_waits_for_ours(run_script):
    for first in ("afork.Executor(1)", "ThreadPoolExecutor(2)"):
        done = run_script(
            f"""
import afork
from concurrent.futures import ThreadPoolExecutor
{first}
ours, theirs = afork.Executor(1), ThreadPoolExecutor(2)
inner = ours.submit(pow, 3, 2)
theirs.submit(lambda: print(inner.result(10), flush=True))
"""
        )
        assert (done.stdout, done.stderr) == ("9\n", "")


@contextlib.contextmanager
def foreground(*args):
    """A script in a session of its own, as if started at a terminal."""
    with subprocess.Popen(
        [sys.executable, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Not ignored, as it is in what a shell has put into the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            yield process
        except BaseException:
            process.kill()  # else leaving the block waits for it
            raise


INTERRUPTED = """
import os, sys, time
import afork

with afork.Executor(1) as executor:
    future = executor.submit(time.sleep, 600)
    while not future.running():
        os.sched_yield()
    try:
        print(*executor._pool.stats().pids, flush=True)
        future.result()
    except KeyboardInterrupt:
        future.cancel()
        print("interrupted", flush=True)
    assert executor.submit(abs, -1).result(10) == 1
    if sys.argv[1:]:
        raise KeyboardInterrupt
"""


@pytest.mark.parametrize("raised", [True, False])
def test_keyboard_interrupt(raised):
    with foreground("-P", "-c", INTERRUPTED, *["raise"] * raised) as process:
        pid = int(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=HANG)
        assert out == "interrupted\n", err
        assert ends(pid)
        assert process.returncode == (-signal.SIGINT if raised else 0)
        assert ("Traceback" in err) == raised


def test_interrupted_at_a_terminal():
    """It does not reach the processes, yet the calls in them end."""
    with foreground(str(SCRIPTS / "executor_interrupted.py")) as process:
        assert process.stdout.readline() == "runs\n"
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=HANG)
        assert process.returncode == -signal.SIGINT, err
