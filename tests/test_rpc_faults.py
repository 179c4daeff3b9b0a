"""What a review has found to go wrong in calls: each fault, once."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import select
import threading

import pytest

import afork
from afork.rpc import _connection

from .conftest import HANG, open_descriptors
from .scripts.rpc_ask import Events, jobs, rpc

__all__ = ["jobs"]

BULK = b"x" * (300 << 10)


def exceptions_of(loop):
    """What the exception handler of a loop is told, from now on."""
    found = []
    loop.set_exception_handler(lambda loop, told: found.append(told["exception"]))
    return found


async def turns_until(predicate):
    """Let the loop turn until something is so; arun puts a limit on it."""
    while not predicate():
        await asyncio.sleep(0)


# -- cancelling


@pytest.mark.parametrize("argument", ["small", BULK], ids=["small", "bulk"])
def test_cancelled_before_its_first_step(arun, argument):
    async def main():
        async with rpc("give", asynchronous=True) as f:
            await f(0)
            for n in range(20):
                call, cancelled = f(n), f(argument)
                cancelled.cancel()
                assert await call == n
        assert f.fork.returncode == 0  # close has ended

    arun(main)


@pytest.mark.parametrize("argument", ["small", BULK], ids=["small", "bulk"])
def test_cancelled_before_its_first_step_in_a_pool(arun, argument):
    import rpc_jobs

    async def main():
        async with afork.Pool(max=1, load=8, asynchronous=True) as pool:
            pid = await pool.call(os.getpid)
            before = await pool.call(rpc_jobs.left_over)
            for n in range(20):
                call = pool.call(rpc_jobs.give, n)
                cancelled = pool.with_options(timeout=60).call(rpc_jobs.give, argument)
                await asyncio.sleep(0)  # a process has got it
                cancelled.cancel()
                assert await call == n
                # It is answered: nobody had to be killed for it.
                await turns_until(lambda: pool.stats().running == 0)
            assert await pool.call(rpc_jobs.left_over) == before
            assert await pool.call(os.getpid) == pid

    arun(main)


# -- what callbacks raise, and unpickling


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_on_event_that_raises_cancelled_error(arun, asynchronous):
    def on_event(event):
        raise asyncio.CancelledError

    async def main():
        told = exceptions_of(asyncio.get_running_loop())
        name = "async_events" if asynchronous else "events"
        async with rpc(name, asynchronous=asynchronous, on_event=on_event) as f:
            calls = [f(3), f(3)]
            assert await asyncio.gather(*calls) == [call.id for call in calls]
        assert [type(exc) for exc in told] == [asyncio.CancelledError] * 6

    arun(main)


def test_an_event_that_cannot_be_unpickled(arun):
    async def main():
        told = exceptions_of(asyncio.get_running_loop())
        events = Events()
        async with rpc("unloadable_event", asynchronous=True, on_event=events) as f:
            assert await asyncio.gather(f(1), f(2)) == [1, 2]
        assert events.all() == [("good",)] * 2
        assert [str(exc) for exc in told] == ["event"] * 2

    arun(main)


def test_a_result_that_cannot_be_unpickled(arun):
    async def main():
        async with rpc("give", asynchronous=True) as f:
            await f(0)
            kinds = (None, StopIteration, asyncio.CancelledError, ValueError, None)
            calls = [f(n, kind) for n, kind in enumerate(kinds)]
            found = await asyncio.gather(*calls, return_exceptions=True)
            assert (found[0], found[4]) == (0, 4)
            for error, name in (
                (found[1], "StopIteration"),
                (found[2], "CancelledError"),
            ):
                assert isinstance(error, afork.RemoteError)
                assert error.type == name
            assert isinstance(found[3], ValueError)
            for error in found[1:4]:
                assert "could not be decoded" in error.__notes__[-1]

    arun(main)


# -- connections


@pytest.mark.parametrize("what", ["Watch", "Link"])
def test_a_connection_that_cannot_be_made(arun, monkeypatch, what):
    def watch(*args):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    class NoLink:
        """_afork, without links; they own their descriptor even then."""

        def __getattr__(self, name):
            return getattr(afork._afork, name)

        def Link(self, fd):
            os.close(fd)
            watch()

    if what == "Watch":
        monkeypatch.setattr(_connection, "Watch", watch)
    else:
        monkeypatch.setattr(_connection, "_afork", NoLink())

    async def main():
        errors = []
        f = rpc("echo", on_error=errors.append)
        for call in [f(1), f(2), f(BULK)]:
            with pytest.raises(OSError, match="open files") as info:
                await call
            assert info.value.errno == errno.EMFILE
        with pytest.raises(OSError, match="open files"):
            f(3)
        await f.close()
        assert [type(exc) for exc in errors] == [OSError]

    arun(main)  # and the guard finds nothing left


def test_many_results_of_a_dead_process_whose_socket_lives_on(arun, gate):
    last = 299

    async def main():
        async with rpc("answer_and_die", asynchronous=True) as f:
            await f(-1, last, gate.path)
            pidfd = os.pidfd_open(f.pid)
            calls = [f(n, last, gate.path) for n in range(last + 1)]
            await asyncio.sleep(0)  # they are sent
            # Nothing is read before it has ended.
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            assert poll.poll(HANG * 1000)
            os.close(pidfd)
            found = await asyncio.gather(*calls, return_exceptions=True)
            assert found[:last] == list(range(last))
            assert isinstance(found[last], afork.WorkerLost)
        gate.open()

    arun(main)


# -- functions that fork

ENDS = {"return": 0, "exit": 7, "raise": 1}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_forked_child_does_not_answer(arun, asynchronous):
    async def main():
        name = "async_fork" if asynchronous else "fork"
        async with rpc(name, asynchronous=asynchronous) as f:
            for how, status in ENDS.items():
                calls = [f(how) for _ in range(4)]
                assert await asyncio.gather(*calls) == [status] * 4, how
        assert f.fork.returncode == 0

    arun(main)


def test_a_forked_child_whose_loop_goes_on_does_not_answer(arun):
    async def main():
        events = Events()
        async with rpc("async_fork_and_wait", asynchronous=True, on_event=events) as f:
            for how, status in ENDS.items():
                assert await f(how) == status
                assert events.all() == [("before",)]
        assert f.fork.returncode == 0

    arun(main)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_child_forked_by_a_generator_does_not_answer(arun, asynchronous):
    async def main():
        name = "async_fork_in_generator" if asynchronous else "fork_in_generator"
        async with rpc(name, asynchronous=asynchronous) as f:
            for how, status in {**ENDS, "yield": 0}.items():
                streams = [f.stream(how) for _ in range(2)]
                for stream in streams:
                    found = [x async for x in stream]
                    assert found == ["before", status], how
        assert f.fork.returncode == 0

    arun(main)


# -- streams


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_context_variables_hold_in_a_generator(arun, asynchronous):
    import rpc_jobs

    func = rpc_jobs.async_variables if asynchronous else rpc_jobs.variables

    async def main():
        async with afork.Pool(
            max=1, asynchronous=asynchronous, contextvars=["rpc_jobs:variable"]
        ) as pool:
            token = rpc_jobs.variable.set("mine")
            assert [x async for x in pool.stream(func, 20)] == ["mine"] * 20
            rpc_jobs.variable.reset(token)
            assert [x async for x in pool.stream(func, 1)] == ["unset"]

    arun(main)


def test_a_stream_that_the_pool_has_ended(arun):
    import rpc_jobs

    async def main():
        async with afork.Pool(max=1) as pool:
            stream = pool.stream(rpc_jobs.one_and_wait)
            assert await anext(stream) == 1
            reader = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            await pool.close(timeout=0.01)
            with pytest.raises(afork.ClosedError):
                await reader

    arun(main)


def test_a_stream_that_is_collected_in_another_thread(arun):
    async def main():
        loop = asyncio.get_running_loop()
        loop.set_debug(True)  # what is not safe to be called there raises
        told = exceptions_of(loop)
        events = Events()
        f = rpc("count_up", on_event=events)
        kept = [f.stream(1000)]
        assert await anext(kept[0]) == 0
        thread = threading.Thread(target=kept.clear)
        thread.start()
        thread.join()
        while (await events.get()).args != ("closed",):
            pass
        await f.close()
        assert not told

    arun(main)


def test_a_stream_that_is_collected_after_its_loop(loop_factory):
    async def main():
        stream = rpc("large_items").stream(1000, len(BULK))
        assert len(await anext(stream)) == len(BULK)
        await turns_until(lambda: len(stream._items.queue) > 4)
        return stream

    def memory():
        return [to for to in open_descriptors().values() if "memfd" in to]

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        stream = runner.run(asyncio.wait_for(main(), HANG))
    assert memory()
    del stream
    gc.collect()
    assert not memory()
