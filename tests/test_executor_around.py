"""An Executor beside others: asyncio, executors in its processes, forks."""

from __future__ import annotations

import asyncio
import importlib
import pickle

import pytest

import afork

from .conftest import HANG
from .scripts import executor_tools, pool_tools
from .scripts.executor_tools import ends
from .scripts.fault_tools import subreaper

gate, jobs = pool_tools.gate, pool_tools.jobs  # fixtures
events, more_jobs = executor_tools.events, executor_tools.more_jobs


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
