"""Pool: calls that are cancelled, take too long, or are tried again."""

from __future__ import annotations

import asyncio
import gc
import os
import signal

import pytest

import afork

from .scripts.fault_tools import log, subreaper  # noqa: F401 - a fixture
from .scripts.pool_tools import Seen, check, gone, turn

# -- cancellation


@pytest.mark.parametrize("load", [1, 3])
def test_cancelling_kills_exactly_the_one_process(arun, jobs, gate, load):
    async def main():
        seen = Seen()
        async with afork.Pool(max=3, load=load, on_event=seen) as pool:
            calls = [pool.call(jobs.hold, gate.path, i) for i in range(3 * load)]
            await seen.held(3)
            held = {e.call_id: e.args[1] for e in seen.all}
            victim = next(call for call in calls if call.id in held)
            victim.cancel()
            check(pool)
            with pytest.raises(asyncio.CancelledError):
                await victim
            await gone([held[victim.id]])
            calls.remove(victim)
            await seen.held(4 if load > 1 else 3)  # another one has begun
            gate.open(len(calls))
            values = await asyncio.gather(*calls)
            assert len(values) == 3 * load - 1
            assert pool.stats().counts.cancelled == 1
            assert pool.stats().counts.lost == 0
            assert sorted(e.args[2] for e in seen.all) == sorted(range(3 * load))
            check(pool)

    arun(main)


def test_cancelling_what_waits(arun, jobs, gate):
    async def main():
        seen = Seen()
        async with afork.Pool(max=1, load=3, on_event=seen) as pool:
            calls = [pool.call(jobs.hold, gate.path, i) for i in range(200)]
            await seen.held(1)
            for call in calls[1:-1]:
                call.cancel()
                check(pool)
            await turn(3)  # the process knows it before it goes on
            gate.open(2)
            assert await calls[0] == 0
            assert await calls[-1] == 199
            await pool.drain()
            assert pool.stats().counts.started == 1
            assert [e.args[2] for e in seen.all] == [0, 199]

    arun(main)


def test_cancelling_what_could_not_be_sent_yet(arun, jobs, gate):
    """The process has been given it, but its socket is full."""

    async def main():
        seen = Seen()
        async with afork.Pool(max=1, load=20, on_event=seen) as pool:
            large = os.urandom(150_000)
            calls = [
                pool.call(jobs.hold, gate.path, (i, large if i else b""))
                for i in range(20)
            ]
            await seen.held(1)
            assert len(next(iter(pool._core.workers)).backlog) > 5
            for call in calls[2:-1]:
                call.cancel()
                check(pool)
            gate.open(20)
            for i in (0, 1, 19):
                assert (await calls[i])[0] == i
            await pool.drain()
            assert [e.args[2][0] for e in seen.all] == [0, 1, 19]
            assert pool.stats().counts.started == 1

    arun(main)


def test_cancelled_too_late(arun, jobs, gate, tmp_path):
    """It waited when it was cancelled, as far as was known, but had begun."""

    async def main():
        seen = Seen()
        async with afork.Pool(max=1, load=2, on_event=seen) as pool:
            first = pool.call(jobs.hold, gate.path, 1)
            begun = tmp_path / "begun"
            view = pool.with_options(kill_after=0.01)
            second = view.call(jobs.note_and_hold, str(begun), gate.path)
            await seen.held(1)
            gate.open()
            while not begun.exists():  # and no turn of the loop meanwhile
                os.sched_yield()
            second.cancel()
            assert await first == 1
            assert await pool.call(jobs.add, 1) == 1, "the second was killed"
            assert pool.stats().counts.started == 2

    arun(main)


@pytest.mark.parametrize("how", ["cancel", "callback", "timeout"])
def test_process_that_has_moved_on(arun, jobs, gate, tmp_path, how):
    """The answer is there, but has not been read; the call behind has begun."""

    async def main():
        seen = Seen()
        async with afork.Pool(max=1, load=2, on_event=seen) as pool:

            def cancel(event):
                seen(event)
                if how == "callback" and len(seen.all) == 2:
                    first.cancel()

            options = {"timeout": 100} if how == "timeout" else {}
            view = pool.with_options(on_event=cancel, **options)
            first = view.call(jobs.hold_twice, gate.path)
            begun = tmp_path / "begun"
            second = pool.call(jobs.note_and_hold, str(begun), gate.path)
            await seen.held(1)
            gate.open(2)
            while not begun.exists():  # and no turn of the loop meanwhile
                os.sched_yield()
            if how == "cancel":
                first.cancel()
            if how == "timeout":
                pool._core.workers.copy().pop()._overdue(first)
                assert await first is None
            await seen.held(3)
            gate.open()
            assert await second is None
            assert first.cancelled() == (how != "timeout")
            assert pool.stats().counts.started == 1
            check(pool)

    arun(main)


def test_cancelling_a_stream(arun, jobs, gate):
    async def main():
        seen = Seen()
        async with afork.Pool(max=1, load=2, on_event=seen) as pool:
            view = pool.with_options(kill_after=0.01)
            # One that does not come to its next item is killed.
            stream = view.stream(jobs.hold_stream, gate.path)
            behind = pool.call(jobs.add, 1)
            pids = await seen.held(1)
            await stream.aclose()
            await gone(pids)
            assert await behind == 1
            # Waiting behind another call.
            first = pool.call(jobs.hold, gate.path)
            await seen.held(2)
            await pool.stream(jobs.count, 10).aclose()
            gate.open()
            await first
            await pool.drain()
            assert pool.stats().counts.started == 2

    arun(main)


def test_cancelling_a_task_that_does_not_end(arun, jobs):
    async def main():
        seen = Seen()
        options = {"asynchronous": True, "load": 3, "on_event": seen}
        async with afork.Pool(max=1, **options) as pool:
            call = pool.with_options(kill_after=0.01).call(jobs.wait_through)
            other = pool.call(jobs.wait)
            pids = await seen.held(2)
            call.cancel()
            await gone(pids[:1])
            with pytest.raises(afork.WorkerLost, match=r"cancelled or overdue|SIGKILL"):
                await other
            assert await pool.call(jobs.add_async, 1) == 1
            assert pool.stats().counts.lost == 0

    arun(main)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_leaving_with_a_stream_that_nobody_reads(
    arun, jobs, tmp_path, asynchronous, begun
):
    async def main():
        function = jobs.forever_async if asynchronous else jobs.forever
        async with afork.Pool(function, asynchronous=asynchronous, max=1) as pool:
            stream = pool.stream(None, str(tmp_path / "log"))
            if begun:
                async for item in stream:
                    assert item == 0
                    break
        assert (tmp_path / "log").read_text() == "closed\n"
        with pytest.raises(afork.ClosedError):
            [item async for item in stream]
        assert pool.stats().counts.cancelled == 1

    arun(main)


def test_closing_while_a_stream_is_read(arun, jobs):
    """By a task that does not wait at the moment."""

    async def main():
        pool = afork.Pool(max=1)
        stream = pool.stream(jobs.count, 300)
        assert await anext(stream) == 0
        items = pool._core.workers.copy().pop().calls[stream.call_id].stream
        while len(items.queue) < 15:
            await turn()
        closing = asyncio.create_task(pool.close())
        await turn()
        assert [item async for item in stream] == list(range(1, 300))
        await closing

    arun(main)


async def turns_to_try(use):
    """As many turns of the loop as something takes, or (if many) some of them."""
    task = asyncio.create_task(use())
    n = 0
    while not task.done():
        await turn()
        n += 1
    await task
    return sorted({*range(12), *(n * i // 25 for i in range(27))})


def test_cancelling_at_every_turn(arun, jobs):
    """A caller that is cancelled after k turns of the loop, from the start on."""

    async def main():
        async with afork.Pool(max=1, load=2) as pool:

            async def use():
                assert await pool.call(jobs.add, 1) == 1
                async with pool.stream(jobs.count, 3) as stream:
                    assert [x async for x in stream] == [0, 1, 2]
                results = pool.map(jobs.add, range(3))
                assert [x async for x in results] == [0, 1, 2]

            for k in await turns_to_try(use):
                await pool.call(jobs.pid)
                task = asyncio.create_task(use())
                await turn(k)
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled() or task.exception() is None
                check(pool)
            await pool.drain()
            gc.collect()
            assert await pool.call(jobs.add, 1) == 1
            assert pool.stats().counts.lost == 0

    arun(main)


@pytest.mark.parametrize("open_calls", [0, 2])
def test_cancelling_a_whole_pool_at_every_turn(arun, jobs, open_calls):
    async def main():
        pids = set()

        async def use():
            async with afork.Pool(max=2, idle=1) as pool:
                try:
                    calls = [pool.call(jobs.add, i) for i in range(4)]
                    for call in calls[: 4 - open_calls]:
                        await call
                finally:
                    pids.update(pool.stats().pids)
            assert not pool.stats().pids

        for k in await turns_to_try(use):
            task = asyncio.create_task(use())
            await turn(k)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() or task.exception() is None
        await gone(list(pids))

    arun(main)


def test_the_loop_is_torn_down(loop_factory, jobs, gate):
    """asyncio.run cancels all tasks, ours included: who waits must not hang."""
    order = []

    async def use(stage):
        try:
            async with afork.Pool(max=1) as pool:
                if stage != "start":
                    await pool.call(jobs.pid)
                order.append(stage)
                await pool.call(jobs.hold, gate.path)
        finally:
            order.append(f"{stage} over")

    async def main():
        tasks = [asyncio.create_task(use(x)) for x in ("start", "call")]
        while len(order) < 2:
            await asyncio.sleep(0)
        return tasks

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        tasks = runner.run(main())
    assert all(task.cancelled() for task in tasks)
    assert sorted(order[2:]) == ["call over", "start over"]


# -- timeouts


def test_timeout_that_the_function_sees(arun, jobs, gate):
    async def main():
        async with afork.Pool(max=1) as pool:
            view = pool.with_options(timeout=0.02)
            with pytest.raises(TimeoutError, match=r"0\.02"):
                await view.call(jobs.hold, gate.path)
            assert await view.call(jobs.hold_catching, gate.path) == "caught"
            assert await view.call(jobs.add, 1) == 1
            assert pool.stats().counts.started == 1
            assert pool.stats().counts.timeouts == 1

    arun(main)


@pytest.mark.parametrize("function", ["hold_blocking", "hold_through"])
@pytest.mark.parametrize("load", [1, 3])
def test_timeout_that_the_function_resists(arun, jobs, gate, function, load):
    async def main():
        seen = Seen()
        async with afork.Pool(max=1, load=load, on_event=seen) as pool:
            view = pool.with_options(timeout=0.02, kill_after=0.02)
            call = view.call(getattr(jobs, function), gate.path)
            behind = [pool.call(jobs.add, i) for i in range(5)]
            with pytest.raises(TimeoutError, match=r"0\.02"):
                await call
            assert await asyncio.gather(*behind) == list(range(5))
            assert pool.stats().counts.timeouts == 1
            assert pool.stats().counts.started == 2
            assert pool.stats().counts.lost == 0
            check(pool)

    arun(main)


def test_timeouts_that_timers_cannot_do(arun, jobs):
    async def main():
        pool = afork.Pool(max=1)
        for wrong in (0, -1, float("nan")):
            with pytest.raises(ValueError, match="must be positive"):
                pool.with_options(timeout=wrong)
        async with pool:
            for much in (1e300, 1e8, float("inf"), None):
                assert await pool.with_options(timeout=much).call(jobs.add, 1) == 1
            for little in (1e-300, 1e-6):
                with pytest.raises(TimeoutError):
                    await pool.with_options(timeout=little).call(signal.pause)
            assert await pool.call(jobs.add, 1) == 1

    arun(main)


def test_timeouts_of_calls_that_wait_have_not_begun(arun, jobs, gate):
    async def main():
        seen = Seen()
        async with afork.Pool(max=1, load=3, on_event=seen) as pool:
            first = pool.call(jobs.hold, gate.path)
            await seen.held(1)
            view = pool.with_options(timeout=0.05, kill_after=0.01)
            others = [view.call(jobs.add, i) for i in range(4)]
            over = pool.with_options(timeout=0.05).call(jobs.hold, gate.path)
            await asyncio.sleep(0.1)  # longer than they may run
            gate.open()
            await first
            assert await asyncio.gather(*others) == [0, 1, 2, 3]
            with pytest.raises(TimeoutError):
                await over
            assert pool.stats().counts.started == 1

    arun(main)


def test_timeout_behind_one_that_is_tried_again(arun, jobs, gate, tmp_path):
    """The clock of a call starts when the one ahead of it goes elsewhere."""

    async def main():
        seen = Seen()
        async with afork.Pool(max=1, load=2, on_event=seen) as pool:
            retried = pool.with_options(retries=1, retry_on=ValueError)
            late = pool.with_options(timeout=0.01, kill_after=0.01)
            first = retried.call(jobs.fail)
            second = late.call(jobs.hold_blocking, gate.path)
            with pytest.raises(TimeoutError):
                await second
            with pytest.raises(ValueError):  # noqa: PT011
                await first

    arun(main)


def test_asynchronous_timeout(arun, jobs):
    async def main():
        seen = Seen()
        options = {"asynchronous": True, "load": 3, "on_event": seen}
        async with afork.Pool(max=1, **options) as pool:
            view = pool.with_options(timeout=0.02, kill_after=0.02)
            other = pool.call(jobs.wait)
            with pytest.raises(TimeoutError):
                await view.call(jobs.wait)
            assert not other.done()
            with pytest.raises(TimeoutError):
                await view.call(jobs.wait_through)
            with pytest.raises(afork.WorkerLost):
                await other
            assert await pool.call(jobs.add_async, 1) == 1

    arun(main)


# -- retries


def test_no_call_is_repeated_unasked(arun, jobs, tmp_path):
    path = str(tmp_path / "log")

    async def main():
        async with afork.Pool(max=1) as pool:
            with pytest.raises(afork.WorkerLost):
                await pool.call(jobs.note_and_crash, path, "SIGKILL")
            assert await pool.call(jobs.add, 1) == 1
            assert pool.stats().counts.lost == 1

    arun(main)
    assert (tmp_path / "log").read_text() == "SIGKILL\n"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_retries(arun, jobs, tmp_path, asynchronous):
    path = tmp_path / "log"
    function = "note_and_crash" + "_async" * asynchronous

    async def main():
        crash = getattr(jobs, function)
        async with afork.Pool(max=1, asynchronous=asynchronous) as pool:

            async def attempts(how, **options):
                path.write_text("")
                with pytest.raises((afork.WorkerLost, ValueError)):
                    await pool.with_options(**options).call(crash, str(path), how)
                return len(path.read_text().split())

            assert await attempts("SIGKILL", retries=2) == 3
            assert await attempts("raise", retries=2) == 1
            assert await attempts("raise", retries=2, retry_on=ValueError) == 3
            assert await attempts("SIGKILL", retries=2, retry_on=[ValueError]) == 1
            assert pool.stats().counts.retries == 4
            large = os.urandom(1 << 20)  # in a descriptor
            view = pool.with_options(retries=1)
            with pytest.raises(afork.WorkerLost):
                await view.call(crash, str(path), "SIGKILL", large)
            check(pool)

    arun(main)


def test_retry_that_succeeds(arun, jobs, tmp_path):
    async def main():
        async with afork.Pool(max=2, load=2) as pool:
            view = pool.with_options(retries=3)
            path = str(tmp_path / "log")
            calls = [view.call(jobs.crash_at_first, path + str(i)) for i in range(6)]
            assert await asyncio.gather(*calls) == [2] * 6
            assert pool.stats().counts.retries == 6
            assert pool.stats().counts.done == 6

    arun(main)


def test_retry_after_a_timeout(arun, jobs, gate, tmp_path):
    async def main():
        async with afork.Pool(max=1) as pool:
            options = {"timeout": 0.02, "kill_after": 0.01, "retries": 2}
            for function in (jobs.hold, jobs.hold_blocking):
                before = pool.stats().counts
                view = pool.with_options(**options, retry_on=TimeoutError)
                with pytest.raises(TimeoutError):
                    await view.call(function, gate.path)
                with pytest.raises(TimeoutError):
                    await pool.with_options(**options).call(function, gate.path)
                await pool.drain()
                counts = pool.stats().counts
                assert counts.retries == before.retries + 2
                assert counts.timeouts == before.timeouts + 4
                assert counts.failed == before.failed + 2

    arun(main)
