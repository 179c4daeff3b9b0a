"""Pool: what becomes of its calls when something goes wrong."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import resource
import signal
import threading

import pytest

import afork

from .conftest import bounded
from .scripts.fault_tools import log, subreaper  # noqa: F401 - a fixture
from .scripts.pool_tools import Seen, check, gate, gone, jobs, turn  # noqa: F401


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


def test_cancelled_too_late(arun, jobs, gate):
    """It was waiting when it was cancelled, and begins all the same."""

    async def main():
        seen = Seen()
        async with afork.Pool(max=1, load=2, on_event=seen) as pool:
            view = pool.with_options(kill_after=0.01)
            first = pool.call(jobs.hold, gate.path, 1)
            second = view.call(jobs.hold, gate.path, 2)
            await seen.held(1)
            # So that the answer to the first has not been seen yet.
            gate.open()
            while len(seen.all) < 2:
                for worker in pool._core.workers:
                    worker.link and os.sched_yield()
                if _readable(pool):
                    break
            second.cancel()
            assert await first == 1
            third = pool.call(jobs.add, 1)
            assert await third == 1, "the process was not kept by the second"

    def _readable(pool):
        import select

        fds = [w.link.fileno() for w in pool._core.workers]
        # The answer, then a moment for the second to be taken.
        return bool(select.select(fds, [], [], 10)[0])

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
            with pytest.raises(TimeoutError, match="0.02"):
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
            with pytest.raises(TimeoutError, match="0.02"):
                await call
            assert await asyncio.gather(*behind) == list(range(5))
            assert pool.stats().counts.timeouts == 1
            assert pool.stats().counts.started == 2
            assert pool.stats().counts.lost == 0
            check(pool)

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


# -- processes that do not start


@pytest.mark.parametrize("load", [1, 3])
def test_init_that_raises(arun, jobs, tmp_path, log, load):
    path = tmp_path / "log"

    async def main():
        told = Seen()
        options = {"init": jobs.init_note_fail, "initargs": (str(path),)}
        async with afork.Pool(max=2, load=load, on_error=told, **options) as pool:
            calls = [pool.call(jobs.add, i) for i in range(5)]
            for call in calls:
                with pytest.raises(LookupError, match="no init today"):
                    await call
            tried = len(path.read_text().split())
            assert 1 <= tried <= 2
            assert len(told.all) == tried
            with pytest.raises(LookupError):
                await pool.call(jobs.add, 1)
            assert len(path.read_text().split()) == tried + 1
            async with asyncio.timeout(0.1):
                await pool.drain()
            check(pool)
        assert pool.stats().counts.failed == 6

    arun(main)
    log.lines.clear()


def test_init_that_raises_while_nobody_calls(arun, jobs, tmp_path, log):
    """No endless respawn."""
    path = tmp_path / "log"

    async def main():
        told = Seen()
        options = {"init": jobs.init_note_fail, "initargs": (str(path),)}
        async with afork.Pool(idle=2, max=2, on_error=told, **options):
            await told.first(2)
            await turn(100)
        assert len(path.read_text().split()) == 2

    arun(main)
    log.lines.clear()


def test_close_while_init_raises(arun, jobs, tmp_path, log):
    async def main():
        pool = afork.Pool(max=1, init=jobs.init_fail)
        calls = [pool.call(jobs.add, i) for i in range(3)]
        await turn()
        await pool.close()
        for call in calls:
            assert isinstance(call.exception(), LookupError)

    arun(main)


@pytest.mark.parametrize("turns", [0, 1, 3, 10, 30, 100])
def test_close_during_the_start(arun, jobs, turns):
    async def main():
        pool = afork.Pool(idle=2, max=3)
        calls = [pool.call(jobs.add, i) for i in range(4)]
        await turn(turns)
        await pool.close()
        assert [call.result() for call in calls] == [0, 1, 2, 3]
        pool = afork.Pool(idle=2, max=3)
        async with pool:
            await turn(turns)
        assert not pool.stats().pids

    arun(main)


def test_a_process_that_cannot_start_beside_ones_that_can(arun, jobs, log, tmp_path):
    """The others do what waits."""

    async def main():
        options = {"init": jobs.init_once, "initargs": (str(tmp_path / "once"),)}
        async with afork.Pool(max=3, **options) as pool:
            assert await pool.call(jobs.add, 1) == 1
            calls = [pool.call(jobs.add, i) for i in range(20)]
            assert await asyncio.gather(*calls) == list(range(20))
            check(pool)

    arun(main)
    log.lines.clear()


def test_no_descriptor_is_left(arun, jobs, log):
    async def main():
        async with afork.Pool(max=2, stdout=print, stderr=print) as pool:
            pool.template
            await turn(3)
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)
            used = max(map(int, os.listdir("/proc/self/fd")))
            for extra in range(1, 8):
                resource.setrlimit(resource.RLIMIT_NOFILE, (used + extra, limit[1]))
                try:
                    await pool.call(jobs.add, 1)
                except OSError:
                    pass
                else:
                    break
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, limit)
                check(pool)
            assert await pool.call(jobs.add, 1) == 1
            check(pool)

    arun(main)
    log.lines.clear()


def test_many_calls_that_cannot_be_sent(arun, jobs, gate):
    """No descriptor for their arguments: each fails, none takes the others along."""

    async def main():
        seen = Seen()
        async with afork.Pool(max=1, on_event=seen) as pool:
            first = pool.call(jobs.hold, gate.path)
            await seen.held(1)
            large = bytearray(300_000)
            calls = [pool.call(jobs.echo, large) for _ in range(300)]
            small = pool.call(jobs.add, 1)
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
            try:
                gate.open()
                await first
                assert await small == 1
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            for call in calls:
                assert isinstance(call.exception(), OSError)
            check(pool)
            assert await pool.call(jobs.add, 1) == 1

    arun(main)


# -- templates


def test_own_template_is_replaced(arun, jobs, gate):
    async def main():
        seen = Seen()
        async with afork.Pool(max=2, on_event=seen) as pool:
            for _ in range(3):
                calls = [pool.call(jobs.hold, gate.path) for _ in range(4)]
                await seen.held(2)
                template = pool.template
                pids = pool.stats().pids
                template.kill()
                await gone(list(pids))
                results = [
                    asyncio.gather(call, return_exceptions=True) for call in calls
                ]
                gate.open(4)
                for (result,) in await asyncio.gather(*results):
                    assert result is None or isinstance(
                        result, afork.WorkerLost | afork.TemplateError
                    )
                assert await pool.call(jobs.add, 1) == 1
                assert pool.template is not template
                check(pool)
                while os.read(gate.fd, 100) == b"":
                    pass
                seen.all.clear()

    arun(main)


def test_given_template_that_dies(arun, jobs, gate, log):
    async def main():
        seen = Seen()
        template = afork.Fork.new()
        async with afork.Pool(template=template, max=2, on_event=seen) as pool:
            calls = [pool.call(jobs.hold, gate.path) for _ in range(4)]
            await seen.held(2)
            template.kill()
            for call in calls:
                with pytest.raises((afork.WorkerLost, afork.TemplateError)):
                    await call
            with pytest.raises(afork.TemplateError):
                await pool.call(jobs.add, 1)
            check(pool)

    arun(main)
    log.lines.clear()


def test_template_that_fails(arun, jobs, log):
    async def main():
        template = afork.Fork.new().eval("1 / 0")
        async with afork.Pool(template=template, max=2) as pool:
            for _ in range(2):
                with pytest.raises(afork.RemoteError, match="ZeroDivisionError"):
                    await pool.call(jobs.add, 1)
        template = afork.Fork.new()
        template.close()
        pool = afork.Pool(template=template)
        with pytest.raises(afork.ClosedError):
            pool.call(jobs.add, 1)
        await pool.close()

    arun(main)
    log.lines.clear()


def test_several_pools_on_one_template(arun, jobs):
    async def main():
        template = afork.Fork.new().require("pool_jobs")
        async with (
            afork.Pool(template=template, max=1) as one,
            afork.Pool(template=template, max=1, asynchronous=True) as two,
        ):
            assert await one.call(jobs.add, 1) == 1
            assert await two.call(jobs.add_async, 2) == 2
        async with afork.Pool(template=template, max=1) as three:
            assert await three.call(jobs.add, 3) == 3

    arun(main)


def test_one_template_for_several_loops(arun, jobs):
    template = afork.Fork.new().require("pool_jobs")

    async def main():
        async with afork.Pool(template=template, max=1) as pool:
            return await pool.call(jobs.add, 1)

    assert [arun(main) for _ in range(3)] == [1, 1, 1]


# -- loops


def test_wrong_loop(arun, jobs):
    async def main():
        async with afork.Pool(max=1) as pool:
            assert await pool.call(jobs.add, 1) == 1
            errors = []

            async def elsewhere():
                for use in (
                    lambda: pool.call(jobs.add, 1),
                    lambda: pool.stream(jobs.count, 1),
                    lambda: pool.template,
                ):
                    with pytest.raises(RuntimeError, match="another event loop"):
                        use()
                for use in (pool.drain, pool.close):
                    with pytest.raises(RuntimeError, match="another event loop"):
                        await use()
                errors.append(None)

            thread = threading.Thread(target=lambda: asyncio.run(elsewhere()))
            thread.start()
            await asyncio.to_thread(thread.join)
            assert errors == [None]
            assert await pool.call(jobs.add, 1) == 1
        with pytest.raises(RuntimeError, match="no running"):
            await asyncio.to_thread(afork.Pool().call, jobs.add, 1)

    arun(main)


# -- close


def test_processes_that_do_not_end(arun, jobs, gate):
    """Whatever they do: they are killed."""

    async def main():
        seen = Seen()
        async with afork.Pool(max=3, on_event=seen) as pool:
            calls = [pool.call(jobs.stay, how) for how in ("term", "thread", "exit")]
            pids = await asyncio.gather(*calls)
        await gone(pids)
        assert not pool.stats().pids

    arun(main)


def test_stopped_processes(arun, jobs):
    async def main():
        async with afork.Pool(max=1) as pool:
            pid = await pool.call(jobs.pid)
            os.kill(pid, signal.SIGSTOP)
            call = pool.call(jobs.add, 1)
            await turn(5)
            call.cancel()
            assert await pool.call(jobs.add, 2) == 2
            pid = await pool.call(jobs.pid)
            os.kill(pid, signal.SIGSTOP)
        await gone([pid])

    arun(main)


def test_close_twice_and_together(arun, jobs, gate):
    async def main():
        seen, over = Seen(), Seen()
        pool = afork.Pool(max=1, on_event=seen, on_destroy=over)
        call = pool.call(jobs.hold, gate.path)
        await seen.held(1)
        first = asyncio.create_task(pool.close())
        second = asyncio.create_task(pool.close())
        await turn()
        assert not first.done()
        await pool.close(timeout=0)
        await asyncio.gather(first, second)
        assert call.cancelled()
        assert len(over.all) == 1

    arun(main)


# -- what processes send


RANDOM = random.Random(1).randbytes(100)
GARBAGE = [b"\0" * 16, b"\xff" * 16, b"x" * 1000, RANDOM, b"\1"]


@pytest.mark.parametrize("data", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage(arun, jobs, data):
    async def main():
        told = Seen()
        async with afork.Pool(max=2, load=2, on_error=told) as pool:
            bad = pool.call(jobs.garbage, data)
            others = [pool.call(jobs.add, i) for i in range(10)]
            if data == b"\1":  # not even a head: only its death ends it
                await asyncio.gather(*others[1:])
                check(pool)
                bad.cancel()
                assert await asyncio.gather(*others) == list(range(10))
                return
            with pytest.raises((afork.ProtocolError, afork.WorkerLost)):
                await bad
            assert await asyncio.gather(*others) == list(range(10))
            check(pool)
            assert len(told.all) == 1

    arun(main)


FRAMES = [
    (kind, payload)
    for kind in (1, 5, 17, 18, 19, 20, 21, 22, 23, 99)
    for payload in (b"", b"\x80\x05garbage", RANDOM)
]


@pytest.mark.parametrize(("kind", "payload"), FRAMES, ids=range(len(FRAMES)))
@pytest.mark.parametrize("id", [0, 1 << 60])
def test_frames_that_mean_nothing(jobs, kind, payload, id):
    """Whatever it sends, the call ends and the others are not touched."""

    async def main():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: None)
        async with afork.Pool(max=2) as pool:
            view = pool.with_options(timeout=0.2, kill_after=0.1)
            bad = view.call(jobs.frame, kind, id, payload)
            others = [pool.call(jobs.add, i) for i in range(3)]
            await asyncio.wait([bad, *others])
            check(pool)
            bad.exception()
            # One that was given to it after it had answered is lost with it.
            errors = [x for x in others if x.exception() is not None]
            assert len(errors) <= (id == 0 and kind in (17, 18, 21))
            await pool.drain()
            lost = (afork.WorkerLost, afork.ProtocolError)
            again = pool.with_options(retries=1, retry_on=lost)
            assert await again.call(jobs.add, 1) == 1

    with asyncio.Runner() as runner:
        runner.run(bounded(main))


def test_a_socket_that_a_grandchild_holds(arun, jobs):
    """The end of the process is noticed although its socket stays open."""

    async def main():
        seen = Seen()
        async with afork.Pool(max=1, on_event=seen) as pool:
            with pytest.raises(afork.WorkerLost, match="SIGKILL"):
                await pool.call(jobs.fork_and_die)
            (event,) = seen.all
            os.kill(event.args[1], signal.SIGKILL)
            assert await pool.call(jobs.add, 1) == 1

    with subreaper():
        arun(main)


