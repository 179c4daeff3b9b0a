"""A worker that is lost: killed, or its call cancelled. Samples as in call_peers.py."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import afork_bench_target as target
from call_cold import Meeting, schedule
from call_peers import Call, forkserver, pool, versions
from meter import Goal, Sample
from peers import load, run_async


class Losses:
    """Milliseconds until the caller knows, and until the next call has its answer."""

    def __init__(self, goal: Goal) -> None:
        self.until = time.perf_counter() + max(goal.seconds, 0.2) * 2
        self.most = goal.count or 50
        self.knows: list[float] = []
        self.next: list[float] = []

    def more(self) -> bool:
        few = len(self.next) < 3 or time.perf_counter() < self.until
        return few and len(self.next) < self.most

    def add(self, begin: float, knows: float, answered: float) -> None:
        self.knows.append((knows - begin) * 1e3)
        self.next.append((answered - begin) * 1e3)

    def sample(self, package: str) -> Sample:
        return {
            "n": len(self.next),
            "seconds": sum(self.next) / 1e3,
            "knows_ms": self.knows,
            "next_ms": self.next,
            "versions": versions(package),
        }


def _looped(
    made: Callable[[], AbstractAsyncContextManager[Call]],
    package: str,
    cancel: bool,
    goal: Goal,
) -> Sample:
    meeting = Meeting()
    meeting.sock.setblocking(False)

    async def main() -> Sample:
        loop = asyncio.get_running_loop()
        losses = Losses(goal)
        async with made() as call:
            await call(target.echo, 0)
            while losses.more():
                task = asyncio.ensure_future(call(target.meet, meeting.address))
                sock, _ = await loop.sock_accept(meeting.sock)
                sock.setblocking(False)
                with sock:
                    pid = int.from_bytes(await loop.sock_recv(sock, 8), "little")
                    await asyncio.sleep(0.02)  # the machine is quiet again
                    begin = time.perf_counter()
                    if cancel:
                        task.cancel()
                    else:
                        os.kill(pid, signal.SIGKILL)
                    try:
                        await task
                    except (asyncio.CancelledError, Exception):
                        knows = time.perf_counter()
                    await call(target.echo, 0)
                    losses.add(begin, knows, time.perf_counter())
        return losses.sample(package)

    try:
        return run_async(main)
    finally:
        meeting.close()


def pool_lost(how: str, goal: Goal) -> Sample:
    return _looped(pool(), "afork", how == "cancelled", goal)


@asynccontextmanager
async def _anyio_cancellable() -> AsyncIterator[Call]:
    load("anyio")
    from anyio import CapacityLimiter, to_process

    limiter = CapacityLimiter(1)
    yield lambda fn, *args: to_process.run_sync(
        fn, *args, cancellable=True, limiter=limiter
    )


def anyio_cancelled(goal: Goal) -> Sample:
    return _looped(_anyio_cancellable, "anyio", True, goal)


def _blocking(
    make: Callable[[], Any],
    schedule: Callable[[Any], Any],
    remake: bool,
    package: str,
    cancel: bool,
    goal: Goal,
) -> Sample:
    """``remake``: a pool that has lost a worker is of no more use."""
    meeting = Meeting()
    losses = Losses(goal)
    pool = make()
    schedule(pool)(target.echo, 0).result()
    while losses.more():
        future = schedule(pool)(target.meet, meeting.address)
        _, pids, there = meeting.wait(1)
        time.sleep(0.02)
        begin = time.perf_counter()
        if cancel:
            future.cancel()
        else:
            os.kill(pids[0], signal.SIGKILL)
        try:
            future.result(30)
        except BaseException:
            knows = time.perf_counter()
        if remake:
            pool = make()
        schedule(pool)(target.echo, 0).result(30)
        losses.add(begin, knows, time.perf_counter())
        there[0].close()
    if hasattr(pool, "shutdown"):
        pool.shutdown()
    else:
        pool.stop()
        pool.join()
    meeting.close()
    return losses.sample(package)


def pebble_lost(how: str, goal: Goal) -> Sample:
    module = load("pebble")
    return _blocking(
        lambda: module.ProcessPool(1, context=forkserver()),
        schedule,
        False,
        "pebble",
        how == "cancelled",
        goal,
    )


def loky_killed(goal: Goal) -> Sample:
    module = load("loky")
    return _blocking(
        lambda: module.get_reusable_executor(1),
        lambda pool: pool.submit,
        True,
        "loky",
        False,
        goal,
    )


def executor_killed(goal: Goal) -> Sample:
    from concurrent.futures import ProcessPoolExecutor

    context = forkserver()
    return _blocking(
        lambda: ProcessPoolExecutor(1, mp_context=context),
        lambda pool: pool.submit,
        True,
        "concurrent.futures",
        False,
        goal,
    )


def trio_cancelled(goal: Goal) -> Sample:
    load("trio_parallel")
    import trio as trio_
    import trio_parallel

    meeting = Meeting()
    losses = Losses(goal)

    async def main() -> None:
        listener = trio_.socket.from_stdlib_socket(meeting.sock)
        limiter = trio_.CapacityLimiter(1)
        await trio_parallel.run_sync(target.echo, 0, limiter=limiter)
        while losses.more():
            done = trio_.Event()
            scope = trio_.CancelScope()

            async def run(scope: Any = scope, done: Any = done) -> None:
                with scope:
                    await trio_parallel.run_sync(
                        target.meet,
                        meeting.address,
                        kill_on_cancel=True,
                        limiter=limiter,
                    )
                done.set()

            async with trio_.open_nursery() as nursery:
                nursery.start_soon(run)
                sock, _ = await listener.accept()
                await sock.recv(8)
                await trio_.sleep(0.02)
                begin = time.perf_counter()
                scope.cancel()
                await done.wait()
                knows = time.perf_counter()
                await trio_parallel.run_sync(target.echo, 0, limiter=limiter)
                losses.add(begin, knows, time.perf_counter())
                sock.close()

    trio_.run(main)
    return losses.sample("trio-parallel")
