"""What comes out of a call besides its answer: events, and items of a stream."""

from __future__ import annotations

import asyncio
import gc
import os
import signal

import pytest

import afork
import afork.rpc

from .scripts.rpc_ask import Events, jobs, rpc

__all__ = ["jobs"]


def test_events_come_ahead_of_the_answer_with_the_id_of_the_call(arun):
    async def main():
        events = Events()
        async with rpc("events", on_event=events) as f:
            first, second = f(3), f(2)
            assert await second == second.id
            assert await first == first.id
            got = [events.get_nowait() for _ in range(5)]
            assert [e.args for e in got] == [
                ("step", 0),
                ("step", 1),
                ("step", 2),
                ("step", 0),
                ("step", 1),
            ]
            assert [e.call_id for e in got] == [first.id] * 3 + [second.id] * 2

    arun(main)


def test_an_exception_of_on_event_is_the_loops_affair(arun):
    async def main():
        seen = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: seen.append(context)
        )
        async with rpc("events", on_event=lambda event: 1 / 0) as f:
            assert await f(3)
            assert await f(1)
        assert [type(c["exception"]) for c in seen] == [ZeroDivisionError] * 4

    arun(main)


def test_outside_of_a_process_there_is_nobody_to_tell():
    for function in (
        afork.rpc.event,
        afork.rpc.flush,
        afork.rpc.call_id,
        afork.rpc.retire,
    ):
        with pytest.raises(RuntimeError, match="only the functions"):
            function()


KINDS = pytest.mark.parametrize(
    ("name", "asynchronous"),
    [("count_up", False), ("async_count_up", True), ("count_up", True)],
)


@KINDS
def test_streams(arun, name, asynchronous):
    async def main():
        async with rpc(name, asynchronous=asynchronous) as f:
            for n in (0, 1, 16, 17, 300):
                assert [x async for x in f.stream(n)] == list(range(n))

    arun(main)


@KINDS
def test_a_slow_reader_suspends_the_generator(arun, name, asynchronous):
    async def main():
        events = Events()
        async with rpc(name, asynchronous=asynchronous, on_event=events) as f:
            made = 0
            async with f.stream(1000) as stream:
                for taken in range(1, 200):
                    await anext(stream)
                    made += sum(1 for args in events.all() if args[0] == "made")
                    # What is on its way, and what the generator holds.
                    assert made <= taken + 17
            while (await events.get()).args != ("closed",):
                pass
            assert [x async for x in f.stream(2)] == [0, 1]

    arun(main)


def test_a_stream_that_raises(arun):
    async def main():
        async with rpc("count_up") as f:
            stream = f.stream(10, fail_at=5)
            assert [await anext(stream) for _ in range(5)] == [0, 1, 2, 3, 4]
            with pytest.raises(ArithmeticError):
                await anext(stream)
        async with rpc("double") as f:
            with pytest.raises(TypeError, match="iter"):
                await anext(f.stream(1))
            assert await f(1) == 2

    arun(main)


@KINDS
def test_leaving_a_stream_ends_the_generator(arun, name, asynchronous):
    async def main():
        events = Events()
        async with rpc(name, asynchronous=asynchronous, on_event=events) as f:
            async for x in f.stream(10**9):
                if x == 40:
                    break
            while (await events.get()).args != ("closed",):
                pass
            assert await anext(f.stream(10**9)) == 0
            gc.collect()
            assert [x async for x in f.stream(3)] == [0, 1, 2]

    arun(main)


async def read(stream):
    async for _ in stream:
        pass


def test_a_stream_of_a_process_that_dies(arun):
    async def main():
        f = rpc("count_up")
        stream = f.stream(10**9)
        assert await anext(stream) == 0
        os.kill(f.pid, signal.SIGKILL)
        with pytest.raises(afork.WorkerLost):
            await read(stream)
        await f.close()

    arun(main)


@KINDS
def test_closing_ends_a_stream_that_nobody_reads(arun, name, asynchronous):
    async def main():
        async with rpc(name, asynchronous=asynchronous) as f:
            stream = f.stream(10**9)
            assert await anext(stream) == 0
        with pytest.raises(afork.ClosedError):
            await read(stream)

    arun(main)
