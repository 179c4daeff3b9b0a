"""Executor: what `concurrent.futures` promises, and what it has beyond that."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import os
import queue
import sys
import threading
import weakref
from concurrent import futures
from concurrent.futures import wait

import pytest

import afork

from .conftest import HANG, need
from .scripts import executor_tools, fault_tools, pool_tools
from .scripts.executor_tools import joined, results

gate, jobs, log = pool_tools.gate, pool_tools.jobs, fault_tools.log  # fixtures
events, more_jobs = executor_tools.events, executor_tools.more_jobs


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
