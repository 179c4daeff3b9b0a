"""Every way to fail, at every place, for Pool, Rpc and Executor.

The right exception for the right call, every other call unharmed, and a pool
that is back to its size.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal

import pytest

import afork

from .scripts.fault_tools import log  # noqa: F401 - a fixture
from .scripts.pool_tools import Seen, check, gone

RAISE = ("raise", "sys.exit", "memory")
DIE = ("os._exit", "SIGSEGV", "SIGKILL", "overflow")
HOW = RAISE + DIE
KINDS = ("pool", "rpc", "executor")


@pytest.fixture
def loop_factory():
    """One kind will do: what is tested here is not about the loop."""
    return asyncio.new_event_loop


class Caller:
    """The same interface to all three."""

    def __init__(self, kind, jobs, init=None, **options):
        self.kind = kind
        self.jobs = jobs
        if kind == "pool":
            args = {} if init is None else {"init": jobs.crash, "initargs": (init,)}
            args = {"max": 2, "idle": 2 if init is None else 0, **args, **options}
            self.pool = afork.Pool(**args)
        elif kind == "rpc":
            fork = afork.Fork.new()
            args = {}
            if init is not None:
                fork.send_arg(init)
                args["init"] = jobs.crash_bytes
            self.rpc = fork.rpc(jobs.call_any, **args, **options)
        else:
            args = {"initializer": jobs.crash, "initargs": (init,)} if init else {}
            self.executor = afork.Executor(2, **args, **options)

    def call(self, fn, *args):
        if self.kind == "pool":
            return self.pool.call(fn, *args)
        if self.kind == "rpc":
            return self.rpc(fn, *args)
        return asyncio.wrap_future(self.executor.submit(fn, *args))

    async def close(self):
        if self.kind == "pool":
            await self.pool.close()
        elif self.kind == "rpc":
            await self.rpc.close()
        else:
            await asyncio.to_thread(self.executor.shutdown)


def assert_lost(error, how):
    assert isinstance(error, afork.WorkerLost), repr(error)
    assert error.pid
    if how == "os._exit":
        assert os.waitstatus_to_exitcode(error.status) == 3
    elif how == "SIGKILL":
        assert error.signal == signal.SIGKILL
    else:
        assert error.signal in (signal.SIGSEGV, signal.SIGBUS)


def assert_error(error, how):
    if how in DIE:
        assert_lost(error, how)
    elif how == "raise":
        assert isinstance(error, ValueError), repr(error)
        assert error.args == ("raised",)
    elif how == "memory":
        assert isinstance(error, MemoryError), repr(error)
    else:
        assert isinstance(error, afork.RemoteError), repr(error)
        assert error.type == "SystemExit"


async def outcome(awaitable):
    try:
        return await awaitable
    except Exception as exc:
        return exc


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("where", ["decode", "run", "encode"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_a_call(arun, jobs, kind, where, how):
    async def main():
        caller = Caller(kind, jobs)
        before = [caller.call(jobs.add, i) for i in range(3)]
        if where == "decode":
            bad = caller.call(jobs.echo, jobs.CrashOnLoad(how))
        elif where == "run":
            bad = caller.call(jobs.crash, how)
        else:
            bad = caller.call(jobs.make_result, how)
        after = [caller.call(jobs.add, i) for i in range(5)]
        assert_error(await outcome(bad), how)
        assert await asyncio.gather(*before) == [0, 1, 2]
        for i, call in enumerate(after):
            result = await outcome(call)
            if kind == "rpc" and how in DIE:  # it is one process
                assert_lost(result, how)
            else:
                assert result == i
        if kind == "rpc" and how in DIE:
            with pytest.raises(afork.WorkerLost):
                caller.call(jobs.add, 1)
        else:
            assert await caller.call(jobs.add, 1) == 1
        if kind == "pool":
            while caller.pool.stats().idle != 2:
                await asyncio.sleep(0)
            check(caller.pool)
            assert caller.pool.stats().counts.lost == (how in DIE)
        await caller.close()

    arun(main)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", KINDS)
def test_in_init(arun, jobs, log, kind, how):  # noqa: F811
    async def main():
        caller = Caller(kind, jobs, init=how)
        calls = [caller.call(jobs.add, i) for i in range(5)]
        for call in calls:
            assert_error(await outcome(call), how)
        if kind != "rpc":
            assert_error(await outcome(caller.call(jobs.add, 1)), how)
        if kind == "pool":
            check(caller.pool)
            assert not caller.pool.stats().waiting
        await caller.close()

    arun(main)
    log.lines.clear()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", KINDS)
def test_between_calls(arun, jobs, gate, log, kind, how):  # noqa: F811
    async def main():
        told = Seen()
        options = {} if kind == "executor" else {"on_error": told}
        caller = Caller(kind, jobs, **options)
        pid = await caller.call(jobs.crash_later, how, gate.path)
        gate.open()
        if how in DIE:
            await gone([pid])
            if kind != "executor":
                (error,) = await told.first(1)
                assert_lost(error, how)
        if kind == "rpc" and how in DIE:
            with pytest.raises(afork.WorkerLost):
                await caller.call(jobs.add, 1)
        else:
            results = [await outcome(caller.call(jobs.add, i)) for i in range(6)]
            if kind == "executor":
                # Its loop may not have seen the end yet.
                results = [x for x in results if not isinstance(x, afork.WorkerLost)]
                assert len(results) >= 5
            else:
                assert results == list(range(6))
        if kind == "pool":
            while caller.pool.stats().idle != 2:
                await asyncio.sleep(0)
            check(caller.pool)
        await caller.close()

    arun(main)


# -- more than one call in a process


@pytest.mark.parametrize("how", DIE)
def test_only_what_ran_is_lost(arun, jobs, gate, tmp_path, how):
    """What waited behind it is moved, and runs once."""
    path = tmp_path / "log"

    async def main():
        seen = Seen()
        async with afork.Pool(max=1, load=4, on_event=seen) as pool:
            first = pool.call(jobs.hold_and_crash, gate.path, how)
            large = os.urandom(300_000)  # in a descriptor
            behind = [
                pool.call(jobs.note_and_add, str(path), i, large) for i in range(8)
            ]
            await seen.held(1)
            assert pool.stats().running == 4
            gate.open()
            assert_lost(await outcome(first), how)
            assert await asyncio.gather(*behind) == list(range(1, 9))
            check(pool)
        assert sorted(path.read_text().split()) == [str(i) for i in range(8)]

    arun(main)


def test_all_that_ran_together_is_lost(arun, jobs):
    """In an asynchronous pool, that is all that the process had been sent."""

    async def main():
        seen = Seen()
        options = {"asynchronous": True, "load": 3, "on_event": seen}
        async with afork.Pool(max=2, **options) as pool:
            calls = [pool.call(jobs.wait, i) for i in range(6)]
            pids = await seen.held(6)
            assert len(set(pids)) == 2
            os.kill(pids[0], signal.SIGKILL)
            lost = {e.call_id for e in seen.all if e.args[1] == pids[0]}
            for call in calls:
                if call.id in lost:
                    assert_lost(await outcome(call), "SIGKILL")
            assert sum(not call.done() for call in calls) == 3
            check(pool)
            for call in calls:
                call.cancel()

    arun(main)


# -- kills at random moments


@pytest.mark.parametrize("load", [1, 4])
def test_random_kills(jobs, tmp_path, log, load):  # noqa: F811
    """No call is lost without a word, and none runs twice."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    path = tmp_path / "log"
    kills = 500

    async def main():
        lost = 0
        killed = set()
        numbers = iter(range(1 << 30))
        done = []

        async def caller(pool):
            nonlocal lost
            while len(killed) < kills:
                number = next(numbers)
                try:
                    result = await pool.call(jobs.note_and_add, str(path), number)
                except afork.WorkerLost:
                    lost += 1
                else:
                    assert result == number + 1
                    done.append(number)

        async with afork.Pool(max=3, load=load) as pool:
            pool.template.require("pool_jobs")
            callers = [asyncio.create_task(caller(pool)) for _ in range(3 * load + 2)]
            while len(killed) < kills:
                for _ in range(rng.randrange(30)):
                    await asyncio.sleep(0)
                # Now and then one that has not even started.
                some = rng.random() < 0.05
                pids = {w.fork.pid for w in pool._core.workers if w.ready or some}
                pids -= killed | {None}
                if pids:
                    pid = rng.choice(sorted(pids))
                    killed.add(pid)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                check(pool)
            await asyncio.gather(*callers)
            await pool.drain()
            check(pool)
            counts = pool.stats().counts
            assert counts.done == len(done)
            assert counts.failed == lost
        return done, next(numbers), lost

    with asyncio.Runner() as runner:
        done, asked, lost = runner.run(asyncio.wait_for(main(), 60))
    ran = path.read_text().split()
    assert len(ran) == len(set(ran)), "a call has run twice"
    assert len(done) + lost == asked, "a call was not answered"
    assert set(map(str, done)) <= set(ran)
    log.lines.clear()
