"""Executor: what `concurrent.futures` promises, and what it has beyond that."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import importlib.util
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import weakref
from concurrent import futures
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, as_completed, wait

import pytest

import afork

from .conftest import HANG, SCRIPTS, need
from .scripts import fault_tools, pool_tools
from .scripts.fault_tools import subreaper, wait_pidfd

gate, jobs, log = pool_tools.gate, pool_tools.jobs, fault_tools.log  # fixtures


class Events:
    """Events of calls, to be waited for in a thread."""

    def __init__(self):
        self.queue = queue.SimpleQueue()

    def __call__(self, event):
        self.queue.put(event.args)

    def held(self, n=1):
        """Wait for n calls to be at the gate; their processes and values."""
        found = [self.queue.get(timeout=HANG) for _ in range(n)]
        assert all(args[0] == "held" for args in found)
        return [args[1:] for args in found]


@pytest.fixture
def events():
    return Events()


@pytest.fixture
def more_jobs(jobs):
    return importlib.import_module("executor_jobs")


def ends(pid):
    """Whether a process that may have ended ends."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return wait_pidfd(fd)
    finally:
        os.close(fd)


def joined(thread):
    thread.join(HANG)
    return not thread.is_alive()


def results(fs):
    return [f.result(HANG) for f in fs]


# -- submit


def test_submit(jobs):
    with afork.Executor(2) as executor:
        assert isinstance(executor, futures.Executor)
        future = executor.submit(jobs.echo, 1, self=2, fn=3, future=4)
        assert isinstance(future, futures.Future)
        assert future.result(HANG) == ((1,), {"self": 2, "fn": 3, "future": 4})
        assert future.exception(HANG) is None
        assert executor.submit(pow, 2, 100).result(HANG) == 2**100
        pids = set(results([executor.submit(jobs.pid) for _ in range(20)]))
        assert len(pids) <= 2
        assert os.getpid() not in pids


def test_states(jobs, gate, events):
    with afork.Executor(1, on_event=events) as executor:
        runs, waits = (executor.submit(jobs.hold, gate.path, i) for i in range(2))
        events.held()
        assert (runs.running(), runs.done(), runs.cancelled()) == (True, False, False)
        assert (waits.running(), waits.done()) == (False, False)
        with pytest.raises(TimeoutError):
            runs.result(0)
        with pytest.raises(TimeoutError):
            runs.exception(0)
        gate.open()
        assert runs.result(HANG) == 0, "a result that was not waited for is no other"
        assert (runs.running(), runs.done(), runs.cancelled()) == (False, True, False)
        events.held()
        assert waits.running()
        gate.open()
        assert waits.result(HANG) == 1


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ((lambda: 1,), r"pickle|local"),
        ((abs, threading.Lock()), "pickle"),
        (("pool_jobs.add", 1), "function is needed"),
    ],
    ids=["function", "argument", "no function"],
)
def test_what_cannot_be_sent_fails_in_its_future(jobs, args, error):
    with afork.Executor(1) as executor:
        with pytest.raises(Exception, match=error):
            executor.submit(*args).result(HANG)
        assert executor.submit(jobs.add, 1).result(HANG) == 1
        with pytest.raises(TypeError):
            executor.submit()


def test_unpicklable_result(jobs):
    with afork.Executor(1) as executor:
        future = executor.submit(jobs.make_result, "raise")
        assert "raised" in str(future.exception(HANG))
        assert executor.submit(jobs.add, 1).result(HANG) == 1


def test_cloudpickle(jobs):
    found = importlib.util.find_spec("cloudpickle") is not None
    need("cloudpickle", found, "no cloudpickle here")
    with afork.Executor(1, codec="cloudpickle") as executor:
        n = 2
        assert list(executor.map(lambda x: n * x, range(5))) == [0, 2, 4, 6, 8]
        assert list(executor.map(lambda x: n * x, range(3), chunksize=2)) == [0, 2, 4]


def test_exceptions(jobs):
    with afork.Executor(1) as executor:
        future = executor.submit(jobs.fail, KeyError, "x")
        with pytest.raises(KeyError, match="x") as info:
            future.result(HANG)
        assert future.exception() is info.value
        assert isinstance(info.value.__cause__, afork.RemoteError)
        assert "in fail" in str(info.value.__cause__)
        for kind in (SystemExit, KeyboardInterrupt, StopIteration, GeneratorExit):
            with pytest.raises(afork.RemoteError, match=kind.__name__):
                executor.submit(jobs.fail, kind).result(HANG)
        with pytest.raises(afork.RemoteError, match="CancelledError"):
            executor.submit(jobs.fail, asyncio.CancelledError).result(HANG)
        # The function's own, not that of result().
        assert isinstance(
            executor.submit(jobs.fail, TimeoutError).exception(HANG), TimeoutError
        )
        assert len(executor._pool.stats().pids) == 1


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSEGV", "os._exit"])
def test_a_crash_fails_its_own_future_only(jobs, gate, events, how):
    with afork.Executor(2, on_event=events) as executor:
        held = executor.submit(jobs.hold, gate.path, "held")
        events.held()
        calls = [executor.submit(jobs.crash, how)]
        calls += [executor.submit(jobs.add, i) for i in range(20)]
        with pytest.raises(afork.WorkerLost):
            calls[0].result(HANG)
        assert results(calls[1:]) == list(range(20))
        gate.open()
        assert held.result(HANG) == "held"
        assert executor.submit(jobs.add, 1).result(HANG) == 1


def test_from_several_threads(jobs):
    start = threading.Barrier(8)

    def work(n):
        start.wait(HANG)
        fs = [executor.submit(jobs.add, n, i) for i in range(50)]
        assert results(fs) == [n + i for i in range(50)]

    with afork.Executor(2) as executor, futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8), timeout=HANG))
        names = [t.name for t in threading.enumerate()]
        assert names.count("afork executor") == 1


# -- map


@pytest.mark.parametrize("chunksize", [1, 3, 100])
def test_map(jobs, chunksize):
    with afork.Executor(2) as executor:

        def run(*args):
            return executor.map(*args, timeout=HANG, chunksize=chunksize)

        assert list(run(abs, range(-10, 0))) == list(range(10, 0, -1))
        assert list(run(jobs.add, range(10), range(5))) == [0, 2, 4, 6, 8]
        assert list(run(abs, ())) == []
        assert list(run(abs)) == []
        assert next(run(jobs.add, [1])) == 1
        with pytest.raises(ValueError, match="chunksize"):
            executor.map(abs, (), chunksize=0)


def test_map_is_eager_and_its_results_are_lazy(jobs, gate, events):
    with afork.Executor(1, on_event=events) as executor:
        items = iter(range(3))
        found = executor.map(jobs.hold, [gate.path] * 3, items)
        assert list(items) == []
        for i in range(3):
            events.held()
            gate.open()
            assert next(found) == i
        assert next(found, None) is None


def test_map_raises_where_the_call_has_failed(jobs):
    with afork.Executor(1) as executor:
        found = executor.map(divmod, [4, 1, 4], [2, 0, 2], timeout=HANG)
        assert next(found) == (2, 0)
        with pytest.raises(ZeroDivisionError):
            next(found)
        found = executor.map(divmod, [4, 1, 4], [2, 0, 2], timeout=HANG, chunksize=2)
        with pytest.raises(ZeroDivisionError):
            next(found)


@pytest.mark.parametrize("chunksize", [1, 2])
@pytest.mark.parametrize("how", ["close", "timeout", "drop"])
def test_map_left_early_cancels_the_rest(jobs, gate, events, how, chunksize):
    with afork.Executor(1, on_event=events) as executor:
        found = executor.map(
            jobs.hold,
            [gate.path] * 6,
            range(6),
            timeout=0 if how == "timeout" else None,
            chunksize=chunksize,
        )
        (pid, _), *_ = events.held()
        if how == "timeout":
            with pytest.raises(TimeoutError):
                next(found)
        else:
            gate.open(chunksize)
            next(found)
            events.held(chunksize)
            if how == "close":
                found.close()
            else:
                del found
        assert executor.submit(jobs.pid).result(HANG) != pid, "what ran was ended"
        assert executor._pool.stats().waiting == 0
        assert events.queue.empty(), "nothing else has begun"


def test_map_with_buffersize(jobs):
    with afork.Executor(1) as executor:
        if sys.version_info < (3, 14):
            with pytest.raises(TypeError, match="buffersize"):
                executor.map(abs, [1], buffersize=1)
            return
        for chunksize in (1, 3):
            items = iter(range(20))
            found = executor.map(abs, items, buffersize=2, chunksize=chunksize)
            assert next(items) == 2 * chunksize, "read as far as it may be"
            assert next(found) == 0
            left = list(found)
            assert left == [x for x in range(1, 20) if x != 2 * chunksize]
        with pytest.raises(ValueError, match="buffersize"):
            executor.map(abs, [1], buffersize=0)


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


# -- cancellation


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


# -- callbacks


def test_done_callbacks(jobs, gate, events, caplog):
    with afork.Executor(1, on_event=events) as executor:
        called = queue.SimpleQueue()

        def fails(future):
            raise LookupError("callback")

        future = executor.submit(jobs.hold, gate.path, 1)
        future.add_done_callback(fails)
        future.add_done_callback(called.put)
        # Further work may come from there.
        future.add_done_callback(lambda f: called.put(executor.submit(jobs.add, 5)))
        gate.open()
        assert called.get(timeout=HANG) is future
        assert called.get(timeout=HANG).result(HANG) == 5
        future.add_done_callback(called.put)  # at once, here
        assert called.get(block=False) is future
        assert "exception calling callback" in caplog.text


@pytest.mark.parametrize("cancelled", [True, False])
def test_callback_that_wants_to_exit(jobs, gate, events, log, cancelled):
    with afork.Executor(1, on_event=events) as executor:
        future = executor.submit(jobs.hold, gate.path, 1)
        future.add_done_callback(sys.exit)
        events.held()
        if cancelled:
            with pytest.raises(SystemExit):
                future.cancel()  # it is called here
        else:
            gate.open()
            assert future.result(HANG) == 1
        assert executor.submit(jobs.add, 1).result(HANG) == 1
    assert len(log.lines) == (not cancelled)
    log.lines.clear()


def test_event_callback_that_exits(jobs, gate, log, caplog):
    """It ends the thread; nobody hangs, and nothing is left."""
    executor = afork.Executor(1, on_event=lambda event: sys.exit())
    fs = [executor.submit(jobs.hold, gate.path, i) for i in range(5)]
    thread = executor._thread
    assert joined(thread.thread)
    done, open_ = wait(fs, HANG)
    assert not open_
    assert all(f.cancelled() for f in done)
    with pytest.raises(RuntimeError, match="has ended"):
        executor.submit(jobs.add, 1)
    executor.shutdown()
    assert log.lines == ["the thread of an executor has ended"]
    log.lines.clear()
    caplog.clear()  # the traceback refers to the pool


# -- initializer


def test_initializer(jobs):
    with afork.Executor(1, initializer=jobs.init, initargs=(1, "a")) as executor:
        assert executor.submit(jobs.get_state).result(HANG) == [1, "a"]


def test_failing_initializer(jobs, log):
    with afork.Executor(2, initializer=jobs.init_fail) as executor:
        for _ in range(2):  # it is no end of the executor
            fs = [executor.submit(jobs.add, i) for i in range(5)]
            for future in fs:
                error = future.exception(HANG)
                assert isinstance(error, LookupError), error
                assert isinstance(error.__cause__, afork.RemoteError)
    log.lines.clear()  # of processes that nobody was waiting for


def test_initializer_that_works_later(jobs, tmp_path, log):
    path = tmp_path / "file"
    path.touch()
    with afork.Executor(1, initializer=jobs.init_once, initargs=(str(path),)) as ex:
        assert isinstance(ex.submit(jobs.add, 1).exception(HANG), FileExistsError)
        path.unlink()
        assert ex.submit(jobs.add, 1).result(HANG) == 1
    log.lines.clear()


def test_crashing_initializer(jobs, log):
    with afork.Executor(1, initializer=jobs.crash, initargs=("SIGKILL",)) as executor:
        error = executor.submit(jobs.add, 1).exception(HANG)
        assert isinstance(error, afork.WorkerLost)
    log.lines.clear()


def test_arguments(jobs):
    for n in (0, -1):
        with pytest.raises(ValueError, match="max_workers"):
            afork.Executor(n)
    with pytest.raises(TypeError, match="exclude"):
        afork.Executor(initializer=jobs.init, init=jobs.init)
    with pytest.raises(TypeError, match="without"):
        afork.Executor(initargs=(1,))
    with pytest.raises(TypeError, match="func"):
        afork.Executor(func=jobs.add)
    with pytest.raises(TypeError):
        afork.Executor(nonsense=1)
    with pytest.raises(TypeError):
        afork.Executor(1, max=2)


# -- starting


def test_template(jobs, more_jobs, arun):
    async def main():
        template = afork.Fork.new().require("wave")
        with afork.Executor(1, template=template) as executor:
            load = loop.run_in_executor
            assert await load(executor, more_jobs.is_loaded, "wave")
        with afork.Executor(1) as executor:
            assert not await load(executor, more_jobs.is_loaded, "wave")
        # It is the user's: it serves others.
        with afork.Executor(1, template=template) as executor:
            assert await load(executor, more_jobs.is_loaded, "wave")
        template.close()

    async def outer():
        nonlocal loop
        loop = asyncio.get_running_loop()
        await main()

    loop = None
    arun(outer)


def test_template_that_is_closed(jobs, log):
    template = afork.Fork.new()
    template.close()
    with afork.Executor(1, template=template) as executor:
        for _ in range(2):
            error = executor.submit(jobs.add, 1).exception(HANG)
            assert isinstance(error, afork.AforkError), error
    log.lines.clear()


def test_no_thread(jobs, monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    with afork.Executor(1) as executor:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(RuntimeError, match="new thread"):
                executor.submit(jobs.add, 1)
        assert executor.submit(jobs.add, 1).result(HANG) == 1


def test_its_loop_is_not_the_policy_s(jobs, monkeypatch):
    """Those of GUI toolkits are of use in the main thread only."""

    def new_event_loop():
        raise AssertionError("in another thread")

    monkeypatch.setattr(asyncio, "new_event_loop", new_event_loop)
    monkeypatch.setattr(asyncio.events, "new_event_loop", new_event_loop)
    with afork.Executor(1) as executor:
        assert executor.submit(jobs.add, 1).result(HANG) == 1


# -- asyncio


def test_run_in_executor(jobs, gate, events, arun):
    async def main():
        loop = asyncio.get_running_loop()
        with afork.Executor(2, on_event=events) as executor:
            found = await asyncio.gather(
                *(loop.run_in_executor(executor, jobs.add, i) for i in range(20))
            )
            assert found == list(range(20))
            with pytest.raises(ValueError, match="x"):
                await loop.run_in_executor(executor, jobs.fail, ValueError, "x")
            held = loop.run_in_executor(executor, jobs.hold, gate.path)
            ((pid, _),) = await asyncio.to_thread(events.held)
            assert held.cancel()
            with pytest.raises(asyncio.CancelledError):
                await held
            assert await asyncio.to_thread(ends, pid)
        await loop.shutdown_default_executor()

    arun(main)


def test_wrap_future(jobs, gate, events, arun):
    async def main():
        loop = asyncio.get_running_loop()
        with afork.Executor(1, on_event=events) as executor:
            assert await asyncio.wrap_future(executor.submit(jobs.add, 1)) == 1
            inner = executor.submit(jobs.hold, gate.path)
            ((pid, _),) = await asyncio.to_thread(events.held)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.wrap_future(inner), 0.001)
            assert inner.cancelled()
            assert await asyncio.to_thread(ends, pid)
            # The other way round.
            inner = executor.submit(jobs.hold, gate.path)
            outer = asyncio.wrap_future(inner)
            inner.cancel()
            with pytest.raises(asyncio.CancelledError):
                await outer
        await loop.shutdown_default_executor()

    arun(main)


def test_context_variables(jobs):
    with afork.Executor(1, contextvars=["pool_jobs:variable"]) as executor:
        for value in ("a", "b"):
            token = jobs.variable.set(value)
            future = executor.submit(jobs.get_variable)
            jobs.variable.reset(token)
            assert future.result(HANG) == value
        assert executor.submit(jobs.get_variable).result(HANG) == "unset"


# -- nesting, copying, forking


@pytest.mark.parametrize("keep", [True, False])
def test_executor_in_a_process_of_another(more_jobs, keep):
    with subreaper(), afork.Executor(1) as executor:
        values, pids = executor.submit(more_jobs.nested, 5, keep).result(HANG)
        assert values == [5, 4, 3, 2, 1]
        # Ours first: those it leaves become children of the test when it has gone.
        pids = [*executor._pool.stats().pids, *pids]
        executor.shutdown()
        assert all(ends(pid) for pid in pids)


def test_pickling(jobs):
    with afork.Executor(1) as executor:
        for what in (executor, executor.submit(jobs.add, 1)):
            with pytest.raises(TypeError, match="pickle"):
                pickle.dumps(what)
            with pytest.raises(TypeError, match="pickle"):
                executor.submit(jobs.echo, what).result(HANG)
        assert executor.submit(jobs.add, 1).result(HANG) == 1


def test_fork_of_the_application(run_script):
    run_script(
        """
import os, sys, time, warnings
import afork
warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads

used, unused = afork.Executor(1), afork.Executor(1)
assert used.submit(abs, -1).result(10) == 1
running = used.submit(time.sleep, 60)
while not running.running():
    os.sched_yield()
pid = os.fork()
if not pid:
    try:
        used.submit(abs, -1)
    except RuntimeError as exc:
        assert "parent" in str(exc), exc
    else:
        raise AssertionError
    running.cancel()
    used.shutdown()
    assert unused.submit(abs, -2).result(10) == 2
    sys.exit(0)  # with all that this does
assert os.waitpid(pid, 0)[1] == 0
assert running.running()
assert not running.done()
assert used.submit(abs, -3) and running.cancel()
assert used.submit(abs, -3).result(10) == 3
assert unused.submit(abs, -3).result(10) == 3
""",
        flags=(),
    )


def test_fork_by_multiprocessing(jobs):
    """The standard executor forks us while ours is at work, or is in ours."""
    with afork.Executor(1) as executor:
        future = executor.submit(importlib.import_module("executor_jobs").standard, 3)
        assert future.result(HANG)[0] == 9


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


# -- memory


def test_nothing_is_kept(jobs, more_jobs):
    """Neither arguments nor the pool's side of a call by its future."""
    with afork.Executor(1) as executor:
        argument = more_jobs.Tracked()
        gone = weakref.ref(argument)
        future = executor.submit(more_jobs.track, argument)
        result = weakref.ref(future.result(HANG))
        executor.submit(abs, 1).result(HANG)  # the loop has gone round
        del argument
        gc.collect()
        assert gone() is None
        assert result() is not None
        assert future._call is None
        del future
        gc.collect()
        assert result() is None


def test_many_futures(jobs, gate, events):
    import tracemalloc

    n = 3_000
    with afork.Executor(1, on_event=events) as executor:
        held = executor.submit(jobs.hold, gate.path)
        events.held()
        tracemalloc.start()
        try:
            fs = [executor.submit(abs, 1) for _ in range(n)]
            reached = threading.Event()
            executor._thread.call(reached.set)
            assert reached.wait(HANG)
            each = tracemalloc.get_traced_memory()[0] / n
        finally:
            tracemalloc.stop()
        assert each < 3000, each
        executor.shutdown(wait=False, cancel_futures=True)
        assert not wait(fs, HANG).not_done
        assert all(f.cancelled() for f in fs)
        gate.open()
        held.result(HANG)
