"""Cancelled calls of an Executor."""

from __future__ import annotations

import queue
import threading
from concurrent import futures
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, as_completed, wait

import pytest

import afork

from .conftest import HANG
from .scripts import executor_tools, pool_tools
from .scripts.executor_tools import ends, results

gate, jobs = pool_tools.gate, pool_tools.jobs  # fixtures
events = executor_tools.events


def test_cancel_what_waits(jobs, gate, events):
    with afork.Executor(1, on_event=events) as executor:
        runs, waits, last = (executor.submit(jobs.hold, gate.path, i) for i in range(3))
        events.held()
        assert waits.cancel()
        assert waits.cancel(), "as often as one likes"
        assert (waits.cancelled(), waits.done(), waits.running()) == (True, True, False)
        with pytest.raises(futures.CancelledError):
            waits.result()
        with pytest.raises(futures.CancelledError):
            waits.exception()
        gate.open(2)
        assert results([runs, last]) == [0, 2]
        assert [value for _, value in events.held()] == [2]
        assert not runs.cancel()
        assert not runs.cancelled()
        assert runs.result() == 0


def test_cancel_before_it_has_reached_the_loop(jobs):
    with afork.Executor(1) as executor:
        go = threading.Event()
        executor.submit(jobs.add, 1).result(HANG)
        executor._thread.call(go.wait, HANG)
        future = executor.submit(jobs.add, 1)
        assert future.cancel()
        go.set()
        assert executor.submit(jobs.add, 2).result(HANG) == 2
        assert executor._pool.stats().counts.done == 2
    assert not executor._thread.open


def test_cancel_what_runs(jobs, gate, events):
    with afork.Executor(2, on_event=events) as executor:
        calls = [executor.submit(jobs.hold, gate.path, i) for i in range(2)]
        held = {value: pid for pid, value in events.held(2)}
        threads = futures.ThreadPoolExecutor(1)
        waiting = threads.submit(calls[0].result, HANG)
        assert calls[0].cancel()
        with pytest.raises(futures.CancelledError):
            waiting.result(HANG)
        threads.shutdown()
        assert calls[0].cancelled()
        assert not calls[0].running()
        assert ends(held[0])
        assert executor.submit(jobs.pid).result(HANG) not in held.values()
        gate.open()
        assert calls[1].result(HANG) == 1, "the other one goes on"
        assert executor._pool.stats().counts.lost == 0


def test_cancel_wakes_waiters_though_the_thread_is_busy(jobs, gate, events):
    with afork.Executor(1, on_event=events) as executor:
        runs, waits = (executor.submit(jobs.hold, gate.path, i) for i in range(2))
        events.held()
        go, blocked = threading.Event(), threading.Event()
        executor._thread.call(lambda: (blocked.set(), go.wait(HANG)))
        assert blocked.wait(HANG)
        with futures.ThreadPoolExecutor(3) as threads:
            waiters = [
                threads.submit(wait, [waits], HANG),
                threads.submit(lambda: list(as_completed([runs, waits], HANG))),
                threads.submit(wait, [runs, waits], HANG, FIRST_EXCEPTION),
            ]
            assert waits.cancel()
            assert runs.cancel()
            assert waiters[0].result(HANG).done == {waits}
            assert set(waiters[1].result(HANG)) == {runs, waits}
            assert waiters[2].result(HANG).done == {runs, waits}
        go.set()
        assert executor.submit(jobs.add, 1).result(HANG) == 1


def test_wait_and_as_completed(jobs, gate, events):
    with afork.Executor(2, on_event=events) as executor:
        held = executor.submit(jobs.hold, gate.path, "held")
        events.held()
        quick = executor.submit(jobs.add, 1)
        done, not_done = wait([held, quick], HANG, FIRST_COMPLETED)
        assert (done, not_done) == ({quick}, {held})
        fails = executor.submit(jobs.fail, ValueError)
        done, not_done = wait([held, fails], HANG, FIRST_EXCEPTION)
        assert (done, not_done) == ({fails}, {held})
        order = as_completed([held, quick, fails], HANG)
        assert {next(order), next(order)} == {quick, fails}
        assert held.cancel()
        assert next(order) is held
        assert wait([held, quick, fails], HANG).not_done == set()


def test_cancel_races_with_the_end(jobs):
    """Each has one end, and each callback is called once."""
    with afork.Executor(2) as executor:
        called = queue.SimpleQueue()
        fs = []
        for i in range(300):
            future = executor.submit(jobs.add, i)
            future.add_done_callback(called.put)
            fs.append(future)
            if i % 3 == 0:
                fs[i // 2].cancel()
        assert not wait(fs, HANG).not_done
        for i, future in enumerate(fs):
            assert future.cancelled() or future.result() == i
        assert {called.get(timeout=HANG) for _ in fs} == set(fs)
        assert called.empty()
    assert not executor._thread.open


def test_cancel_in_an_asynchronous_pool(jobs, events):
    """The task ends, the process does not."""
    with afork.Executor(1, asynchronous=True, load=5, on_event=events) as executor:
        held = executor.submit(jobs.wait)
        ((pid, _),) = events.held()
        assert executor.submit(jobs.add_async, 1, b=2).result(HANG) == 3
        assert held.cancel()
        assert executor.submit(jobs.apply, "add_async", 1).result(HANG) == 1
        assert executor._pool.stats().pids == (pid,)
