"""Small calls into worker processes: ours and those of the peers.

Every contender runs in a fresh application process (app.py) and returns that round's
sample. The peers that block are used the way they are fastest, from plain code and not
through an event loop.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import afork_bench_target as target
from meter import Goal, Meter, Sample, measure
from peers import load, run_async

#: Calls fn(*args) and gives a function that waits for its result.
Submit = Callable[..., Callable[[], Any]]
Call = Callable[..., Awaitable[Any]]


def forkserver() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([target.__name__])
    return context


# -- the peers: one worker each


@contextmanager
def executor() -> Iterator[Submit]:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1, mp_context=forkserver()) as pool:
        yield lambda *call: pool.submit(*call).result


@contextmanager
def mp_pool() -> Iterator[Submit]:
    with forkserver().Pool(1) as pool:
        yield lambda fn, *args: pool.apply_async(fn, args).get


@contextmanager
def loky() -> Iterator[Submit]:
    pool = load("loky").ProcessPoolExecutor(1)
    yield lambda *call: pool.submit(*call).result
    pool.shutdown(kill_workers=True)


@contextmanager
def pebble() -> Iterator[Submit]:
    with load("pebble").ProcessPool(1, context=forkserver()) as pool:
        yield lambda fn, *args: pool.schedule(fn, args=args).result
        pool.stop()


@contextmanager
def billiard() -> Iterator[Submit]:
    load("billiard")
    import billiard

    context = billiard.get_context("forkserver")
    pool = context.Pool(1)
    yield lambda fn, *args: pool.apply_async(fn, args).get
    pool.terminate()
    pool.join()


_EXECNET = """
from importlib import import_module
function = getattr(import_module({module!r}), {name!r})
for args in channel:
    channel.send(function(*args))
"""


@contextmanager
def execnet() -> Iterator[Submit]:
    """One function, and answers in order: so its channels are meant."""
    group = load("execnet").Group()
    source = _EXECNET.format(module=target.__name__, name="echo")
    channel = group.makegateway("popen").remote_exec(source)

    def submit(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        assert fn is target.echo
        channel.send(args)
        return channel.receive  # type: ignore[no-any-return]

    yield submit
    channel.close()
    group.terminate(1.0)


BLOCKING = {
    "ppe": (executor, "concurrent.futures"),
    "mp-pool": (mp_pool, "multiprocessing"),
    "loky": (loky, "loky"),
    "pebble": (pebble, "pebble"),
    "billiard": (billiard, "billiard"),
    "execnet": (execnet, "execnet"),
}


def blocking(name: str, goal: Goal) -> Sample:
    """A window of ``inflight`` calls: whoever waits for the oldest makes the next."""
    peer, package = BLOCKING[name]
    with peer() as submit:
        for warm in (goal.brief(), goal):
            open_calls: deque[Callable[[], Any]] = deque()
            meter = Meter(warm)
            while True:
                while len(open_calls) < goal.inflight and meter.more():
                    open_calls.append(submit(target.echo, meter.started))
                if not open_calls:
                    break
                open_calls.popleft()()
            sample = meter.stop()
    return {**sample, "versions": versions(package)}


def versions(package: str) -> dict[str, str]:
    from importlib import metadata

    try:
        return {package: metadata.version(package)}
    except metadata.PackageNotFoundError:  # the standard library's
        return {}


# -- ours, and the peers of event loops


@asynccontextmanager
async def rpc() -> AsyncIterator[Call]:
    afork = load("afork")
    template = afork.Fork.new().require(target.__name__)
    async with template.fork().rpc("afork_bench_target.echo") as rpc:
        yield lambda fn, *args: rpc(*args)


def pool(load_: int = 1) -> Callable[[], AbstractAsyncContextManager[Call]]:
    @asynccontextmanager
    async def made() -> AsyncIterator[Call]:
        async with load("afork").Pool(max=1, load=load_) as pool:
            pool.template.require(target.__name__)
            yield pool.call

    return made


@asynccontextmanager
async def executor_in_loop() -> AsyncIterator[Call]:
    from concurrent.futures import ProcessPoolExecutor

    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(1, mp_context=forkserver()) as pool:
        yield lambda *call: loop.run_in_executor(pool, *call)


@asynccontextmanager
async def anyio_process() -> AsyncIterator[Call]:
    load("anyio")
    from anyio import CapacityLimiter, to_process

    limiter = CapacityLimiter(1)
    yield lambda fn, *args: to_process.run_sync(fn, *args, limiter=limiter)


def descendants() -> list[int]:
    """All processes that this one has started, and they."""
    found, new = [], {os.getpid()}
    while new:
        found += new
        parents, new = new, set()
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended
                continue
            if parent in parents:
                new.add(int(stat.parent.name))
    return found[1:]


def place(cpus: int) -> None:
    """Keep our processes on one processor, or us on one and them on another.

    Left to itself the kernel does either, now this and then that. To wake another
    processor that sleeps takes longer than all the rest.
    """
    usable = sorted(os.sched_getaffinity(0))
    for pid in descendants():
        os.sched_setaffinity(pid, {usable[0] if cpus == 2 else usable[-1]})
    os.sched_setaffinity(0, {usable[-1]})


async def calls(
    made: Callable[[], AbstractAsyncContextManager[Call]], goal: Goal, cpus: int
) -> Sample:
    """As many tasks as calls may be in flight, each with one at a time."""
    async with made() as call:
        if cpus:
            await call(target.echo, 0)
            place(cpus)
        return await measure(lambda: call(target.echo, 1), goal)


def looped(
    made: Callable[[], AbstractAsyncContextManager[Call]],
    package: str,
    loop_package: str | None = None,
    cpus: int = 0,
) -> Callable[[Goal], Sample]:
    def contender(goal: Goal) -> Sample:
        sample = run_async(lambda: calls(made, goal, cpus), loop_package)
        return {**sample, "versions": versions(package)}

    return contender


one_rpc = looped(rpc, "afork", cpus=2)
one_rpc_uvloop = looped(rpc, "afork", "uvloop", cpus=2)
one_pool = looped(pool(), "afork", cpus=2)
one_pool_uvloop = looped(pool(), "afork", "uvloop", cpus=2)
together_rpc = looped(rpc, "afork", cpus=1)
together_rpc_uvloop = looped(rpc, "afork", "uvloop", cpus=1)
together_pool = looped(pool(), "afork", cpus=1)
together_pool_uvloop = looped(pool(), "afork", "uvloop", cpus=1)
many_rpc = looped(rpc, "afork")
many_rpc_uvloop = looped(rpc, "afork", "uvloop")
many_pool = looped(pool(64), "afork")
many_pool_uvloop = looped(pool(64), "afork", "uvloop")
ppe_asyncio = looped(executor_in_loop, "concurrent.futures")
anyio = looped(anyio_process, "anyio")


def trio(goal: Goal) -> Sample:
    """trio-parallel, one worker."""
    load("trio_parallel")
    import trio as trio_
    import trio_parallel

    async def lane(meter: Meter, limiter: Any) -> None:
        while meter.more():
            await trio_parallel.run_sync(target.echo, 1, limiter=limiter)

    async def main() -> Sample:
        limiter = trio_.CapacityLimiter(1)
        for warm in (goal.brief(), goal):
            meter = Meter(warm)
            async with trio_.open_nursery() as nursery:
                for _ in range(goal.inflight):
                    nursery.start_soon(lane, meter, limiter)
            sample = meter.stop()
        return sample

    return {**trio_.run(main), "versions": versions("trio-parallel")}


def rpc_window(goal: Goal) -> Sample:
    """Without a task per call: the futures themselves, as the blocking peers do it."""

    async def main() -> Sample:
        async with rpc() as call:
            open_calls: deque[Awaitable[Any]] = deque()
            for warm in (goal.brief(), goal):
                meter = Meter(warm)
                while True:
                    while len(open_calls) < goal.inflight and meter.more():
                        open_calls.append(call(target.echo, 1))
                    if not open_calls:
                        break
                    await open_calls.popleft()
                sample = meter.stop()
            return sample

    return run_async(main)
