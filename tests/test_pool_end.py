"""Pool: drained, closed, left, dropped, forgotten."""

from __future__ import annotations

import asyncio
import gc

import pytest

import afork

from .conftest import bounded
from .scripts.fault_tools import log  # noqa: F401 - a fixture
from .scripts.pool_tools import Seen, gone, turn


def test_on_destroy(arun, jobs):
    async def main():
        over = Seen()
        async with afork.Pool(max=2, on_destroy=over) as pool:
            await pool.call(jobs.pid)
            assert not over.all
        assert len(over.all) == 1

    arun(main)


def test_drain_and_close(arun, jobs, gate):
    async def main():
        seen = Seen()
        pool = afork.Pool(max=1, on_event=seen)
        await pool.drain()
        calls = [pool.call(jobs.hold, gate.path, i) for i in range(3)]
        drained = asyncio.create_task(pool.drain())
        for i in range(3):
            await seen.held(i + 1)
            assert not drained.done()
            gate.open()
        await drained
        assert [call.result() for call in calls] == [0, 1, 2]
        calls = [pool.call(jobs.hold, gate.path, i) for i in range(3)]
        closed = asyncio.create_task(pool.close())
        await seen.held(4)
        with pytest.raises(afork.ClosedError):
            pool.call(jobs.pid)
        gate.open(3)
        await closed
        assert [call.result() for call in calls] == [0, 1, 2]
        await pool.close()
        assert pool.stats().pids == ()
        with pytest.raises(afork.ClosedError):
            pool.call(jobs.pid)

    arun(main)


def test_close_with_a_timeout(arun, jobs, gate):
    async def main():
        seen = Seen()
        pool = afork.Pool(max=1, on_event=seen)
        calls = [pool.call(jobs.hold_blocking, gate.path) for i in range(3)]
        pids = await seen.held(1)
        await pool.close(timeout=0.01)
        assert all(call.cancelled() for call in calls)
        await gone(pids)
        assert pool.stats().counts.cancelled == 3

    arun(main)


def test_streams_that_are_cut_off(arun, jobs, gate):
    """Whoever reads one must not take it for complete."""

    async def main():
        seen = Seen()
        pool = afork.Pool(max=1, on_event=seen)
        stream = pool.stream(jobs.hold_stream, gate.path, 3)
        gate.open()
        assert await anext(stream) == 0
        await pool.close(timeout=0)
        with pytest.raises(afork.ClosedError):
            await anext(stream)
        await stream.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    arun(main)


def test_block_left_by_an_exception(arun, jobs, gate):
    async def main():
        seen = Seen()
        pool = afork.Pool(max=1, on_event=seen)

        async def use():
            async with pool:
                calls = [pool.call(jobs.hold, gate.path) for _ in range(2)]
                raise ZeroDivisionError(calls, await seen.held(1))

        with pytest.raises(ZeroDivisionError) as info:
            await use()
        calls, pids = info.value.args
        assert all(call.cancelled() for call in calls)
        await gone(pids)
        assert pool.stats().pids == ()

    arun(main)


def test_dropped_with_calls_open(arun, jobs, gate):
    async def main():
        seen, over = Seen(), Seen()
        pool = afork.Pool(max=1, on_event=seen, on_destroy=over)
        calls = [pool.call(jobs.hold, gate.path, i) for i in range(3)]
        pids = await seen.held(1)
        del pool
        gc.collect()
        gate.open(3)
        assert await asyncio.gather(*calls) == [0, 1, 2]
        await over.first(1)
        await gone(pids)

    arun(main)


def test_dropped_unused_or_idle(arun, jobs):
    async def main():
        afork.Pool()
        over = Seen()
        pool = afork.Pool(idle=1, max=1, on_destroy=over)
        pid = await pool.call(jobs.pid)
        del pool
        gc.collect()
        await over.first(1)
        await gone([pid])

    arun(main)


def test_left_to_the_end_of_the_loop(arun, jobs, gate):
    """Neither closed nor dropped: the processes end with the loop."""
    kept = []

    async def main():
        pool = afork.Pool(idle=1, max=2)
        kept.append(pool)
        kept.append(await pool.call(jobs.pid))
        kept.append(pool.call(jobs.hold, gate.path))
        await turn()

    arun(main)
    pid = kept[1]
    kept.clear()
    gc.collect()
    gate.open()  # what runs is finished
    asyncio.run(bounded(lambda: gone([pid])))


def test_started_from_spares(arun, jobs):
    """What takes the place of a lost process has been forked in advance."""

    async def main():
        template = afork.Fork.new().require("pool_jobs").spares(2)
        async with afork.Pool(template=template, max=1) as pool:
            for _ in range(4):
                pid = await pool.call(jobs.pid)
                with pytest.raises(afork.WorkerLost):
                    await pool.call(jobs.crash, "SIGKILL")
                while (await template.stats())["spares"]["ready"] == 0:
                    await asyncio.sleep(0)
                assert await pool.call(jobs.pid) != pid
            assert (await template.stats())["spares"]["hits"] > 0
        template.close()
        await template.wait()

    arun(main)
