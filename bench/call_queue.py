"""100,000 calls that wait: what each takes, and how long the loop stands still.

Samples as in call_peers.py.
"""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import afork_bench_target as target
from app import rss
from call_peers import forkserver, pool, rpc
from meter import Goal, Sample
from peers import run_async
from stall import Ticker

COUNT = 100_000
COUNT_SLOW = 20_000  # of a peer that takes 12 s for the others' number
BATCH = 64


class Memory:
    """What has been allocated since."""

    def __init__(self, traced: bool) -> None:
        gc.collect()
        if traced:
            tracemalloc.start()
        self._traced = traced
        self._before = self._now()

    def _now(self) -> int:
        return tracemalloc.get_traced_memory()[0] if self._traced else rss()

    def each(self, count: int = COUNT) -> float:
        used = (self._now() - self._before) / count
        if self._traced:
            tracemalloc.stop()
        return used


async def _drain(futures: list[Any], begin: float, memory: float) -> Sample:
    submitted = time.perf_counter()
    ticker = Ticker()
    for future in futures:
        await future
    ticks = ticker.stop()
    end = time.perf_counter()
    return {
        "n": COUNT,
        "seconds": end - submitted,
        "submit_us": (submitted - begin) * 1e6 / COUNT,
        "bytes": memory,
        "ticker": ticks,
    }


def _queue(made: Callable[[], Any], traced: bool) -> Sample:
    async def main() -> Sample:
        async with made() as call:
            await call(target.echo, 0)
            numbers = list(range(COUNT))  # the arguments are the caller's
            memory = Memory(traced)
            begin = time.perf_counter()
            futures = [call(target.echo, x) for x in numbers]
            return await _drain(futures, begin, memory.each())

    return run_async(main)


def pool_rss(goal: Goal) -> Sample:
    return _queue(pool(BATCH), False)


def pool_traced(goal: Goal) -> Sample:
    return _queue(pool(BATCH), True)


def rpc_rss(goal: Goal) -> Sample:
    return _queue(rpc, False)


def rpc_traced(goal: Goal) -> Sample:
    return _queue(rpc, True)


def bare(goal: Goal) -> Sample:
    """Futures that the loop completes by itself, as many a turn as a worker answers."""

    async def main() -> Sample:
        loop = asyncio.get_running_loop()
        memory = Memory(False)
        begin = time.perf_counter()
        futures = [loop.create_future() for _ in range(COUNT)]
        each = memory.each()

        def step(at: int) -> None:
            for future in futures[at : at + BATCH]:
                future.set_result(None)
            if at + BATCH < COUNT:
                loop.call_soon(step, at + BATCH)

        loop.call_soon(step, 0)
        return await _drain(futures, begin, each)

    return run_async(main)


def _ppe(traced: bool) -> Sample:
    """It has no loop that could stand still."""
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1, mp_context=forkserver()) as executor:
        executor.submit(target.echo, 0).result()
        numbers = list(range(COUNT_SLOW))
        memory = Memory(traced)
        begin = time.perf_counter()
        futures = [executor.submit(target.echo, x) for x in numbers]
        submitted = time.perf_counter()
        each = memory.each(COUNT_SLOW)
        for future in futures:
            future.result()
    return {
        "n": COUNT_SLOW,
        "seconds": time.perf_counter() - submitted,
        "submit_us": (submitted - begin) * 1e6 / COUNT_SLOW,
        "bytes": each,
    }


def ppe_rss(goal: Goal) -> Sample:
    return _ppe(False)


def ppe_traced(goal: Goal) -> Sample:
    return _ppe(True)
