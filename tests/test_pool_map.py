"""Pool.map: in order or as completed, bounded, lazily, and left early."""

from __future__ import annotations

import asyncio

import pytest

import afork

from .scripts.fault_tools import log  # noqa: F401 - a fixture
from .scripts.pool_tools import Seen, check, turn


class Source:
    """An iterable that counts what was read from it."""

    def __init__(self, n):
        self.n = n
        self.read = 0
        self.closed = False

    def __iter__(self):
        while self.read < self.n:
            self.read += 1
            yield self.read - 1


class AsyncSource(Source):
    async def items(self):
        try:
            for item in self:
                await asyncio.sleep(0)
                yield item
        finally:
            self.closed = True


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("limit", [1, 3, None])
def test_all_results(arun, jobs, asynchronous, ordered, limit):
    async def main():
        async with afork.Pool(max=2, load=2) as pool:
            source = AsyncSource(50) if asynchronous else range(50)
            items = source.items() if asynchronous else source
            results = pool.map(jobs.add, items, ordered=ordered, limit=limit)
            found = [x async for x in results]
            assert (found if ordered else sorted(found)) == list(range(50))
            empty = pool.map(jobs.add, [], ordered=ordered, limit=limit)
            assert [x async for x in empty] == []
            check(pool)

    arun(main)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_reads_no_more_than_it_has_room_for(arun, jobs, asynchronous, ordered):
    async def main():
        async with afork.Pool(max=1) as pool:
            source = AsyncSource(100) if asynchronous else Source(100)
            items = source.items() if asynchronous else source
            results = pool.map(jobs.add, items, ordered=ordered, limit=4)
            await turn(10)
            assert source.read == 0
            for n in range(1, 50):
                assert await anext(results) == n - 1
                await pool.drain()
                await turn(10)
                assert source.read <= n + 3
            await results.aclose()
            await pool.drain()
            assert source.read <= 53
            check(pool)

    arun(main)


def test_as_completed(arun, jobs, gate):
    async def main():
        seen = Seen()
        async with afork.Pool(max=2, on_event=seen) as pool:
            items = [("hold", gate.path), ("add", 5), ("add", 6)]
            results = pool.map(jobs.named, items, ordered=False)
            assert await anext(results) == 5
            assert await anext(results) == 6
            gate.open()
            assert await anext(results) is None
            with pytest.raises(StopAsyncIteration):
                await anext(results)

    arun(main)


@pytest.mark.parametrize("ordered", [False, True])
def test_results_do_not_wait_for_a_slow_source(arun, jobs, ordered):
    async def main():
        queue = asyncio.Queue()

        async def source():
            while (item := await queue.get()) is not None:
                yield item

        async with afork.Pool(max=2) as pool:
            results = pool.map(jobs.add, source(), ordered=ordered)
            queue.put_nowait(0)
            async for x in results:
                queue.put_nowait(x + 1 if x < 10 else None)
            assert x == 10

    arun(main)


@pytest.mark.parametrize("ordered", [False, True])
def test_closing_early_cancels(arun, jobs, gate, ordered):
    async def main():
        seen = Seen()
        async with afork.Pool(max=1, on_event=seen) as pool:
            source = AsyncSource(100)
            gates = ((gate.path, i) async for i in source.items())
            results = pool.map(jobs.hold_pair, gates, ordered=ordered, limit=10)
            first = asyncio.ensure_future(anext(results))
            await seen.held(1)
            gate.open()
            await first
            await results.aclose()
            await pool.drain()
            check(pool)
            assert pool.stats().counts.done == 1
            assert pool.stats().counts.cancelled >= 1
            assert await pool.call(jobs.add, 1) == 1

    arun(main)


@pytest.mark.parametrize("ordered", [False, True])
def test_cancelling_who_reads(arun, jobs, gate, ordered):
    async def main():
        seen = Seen()
        async with afork.Pool(max=2, on_event=seen) as pool:

            async def read():
                items = [(gate.path, 0)] * 5
                async for _ in pool.map(jobs.hold_pair, items, ordered=ordered):
                    pass

            task = asyncio.create_task(read())
            await seen.held(2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await pool.drain()
            assert pool.stats().counts.cancelled == 4
            check(pool)

    arun(main)


@pytest.mark.parametrize("ordered", [False, True])
def test_exceptions(arun, jobs, ordered):
    async def main():
        async def broken():
            yield 1
            raise LookupError("source")

        def broken_too():
            yield 1
            raise LookupError("source")

        async def read(results):
            return [x async for x in results]

        async with afork.Pool(max=2) as pool:
            with pytest.raises(ValueError, match="5"):
                await anext(pool.map(jobs.raise_it, [ValueError(5)], ordered=ordered))
            for source in (broken(), broken_too()):
                with pytest.raises(LookupError, match="source"):
                    await read(pool.map(jobs.add, source, ordered=ordered))
            with pytest.raises(TypeError, match="iterable"):
                await anext(pool.map(jobs.add, 5, ordered=ordered))
            with pytest.raises(ValueError, match="limit"):
                pool.map(jobs.add, [], limit=0)
            with pytest.raises(Exception, match=r"pickle|local object"):
                await anext(pool.map(lambda x: x, [1], ordered=ordered))
            await pool.drain()
            check(pool)

    arun(main)


def test_options_of_the_view(arun, jobs, gate):
    async def main():
        async with afork.Pool(max=1) as pool:
            view = pool.with_options(timeout=0.05, retries=1)
            results = view.map(jobs.hold_pair, [(gate.path, 0)])
            with pytest.raises(TimeoutError):
                await anext(results)

    arun(main)
