"""Worker starts in Python (scenario 1): multiprocessing's and ours.

The others are limits.c, lean_fork.py and anyevent_fork.pl.

Every function runs in a fresh application process (app.py) and returns that round's
sample.
"""

from __future__ import annotations

import asyncio
import importlib
import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Awaitable, Callable
from typing import Any

import afork_bench_target
from meter import Goal, Meter, Sample, Unavailable, first, measure

TARGET = "afork_bench_target.leave"
NO_IMPORT = "builtins.id"


def load(name: str) -> Any:
    """Import a contender's package, or say that it is not installed.

    One that is there but broken is an error.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise Unavailable("not installed") from None


def loop_factory(package: str | None) -> Any:
    """Of the loop of this package, for asyncio.Runner; None is asyncio's own."""
    return load(package).new_event_loop if package else None


def run_async(
    main: Callable[[], Awaitable[Sample]], loop_package: str | None = None
) -> Sample:
    """Run on asyncio's own loop, or on that of ``loop_package``."""

    async def entered() -> Sample:
        return await main()

    with asyncio.Runner(loop_factory=loop_factory(loop_package)) as runner:
        return runner.run(entered())


def _multiprocessing(
    method: str, goal: Goal, package: str = "multiprocessing"
) -> Sample:
    """Start and join, ``inflight`` at a time: all that a user of it does."""
    context = load(package).get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([afork_bench_target.__name__])

    def start() -> Any:
        process = context.Process(target=afork_bench_target.leave)
        process.start()
        return process

    def join(process: Any) -> None:
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"{method}: exit code {process.exitcode}")

    begin = time.perf_counter()
    join(start())
    first_ms = (time.perf_counter() - begin) * 1e3

    running: dict[Any, Any] = {}
    meter = Meter(goal)
    while True:
        while len(running) < goal.inflight and meter.more():
            process = start()
            running[process.sentinel] = process
        if not running:
            break
        ready = (
            list(running)
            if goal.inflight == 1
            else multiprocessing.connection.wait(list(running))
        )
        for sentinel in ready:
            join(running.pop(sentinel))
    return {**meter.stop(), "first_ms": first_ms}


def forkserver(goal: Goal) -> Sample:
    return _multiprocessing("forkserver", goal)


def spawn(goal: Goal) -> Sample:
    return _multiprocessing("spawn", goal)


def billiard(goal: Goal) -> Sample:
    return _multiprocessing("forkserver", goal, "billiard")


def one_by_one(start: Callable[[], object], goal: Goal) -> Sample:
    """What blocks the application, in no loop."""
    begin = time.perf_counter()
    start()
    first_ms = (time.perf_counter() - begin) * 1e3
    meter = Meter(goal)
    while meter.more():
        start()
    return {**meter.stop(), "first_ms": first_ms}


def pebble(goal: Goal) -> Sample:
    """Its decorator: each call has a process of its own."""
    concurrent = load("pebble").concurrent
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pebble", afork_bench_target.__name__])
    call = concurrent.process(context=context)(afork_bench_target.leave)
    return one_by_one(lambda: call().result(), goal)


def loky(goal: Goal) -> Sample:
    """It has no processes without a pool."""
    package = load("loky")

    def start() -> None:
        with package.ProcessPoolExecutor(1) as pool:
            pool.submit(afork_bench_target.leave).result()

    return one_by_one(start, goal)


async def _until_eof(begun: Awaitable[Any]) -> None:
    """Ours in the seed's benchmark: our end of the socket, then EOF."""
    sock = await begun
    if await asyncio.get_running_loop().sock_recv(sock, 1) != b"":
        raise RuntimeError("the worker sent something")
    sock.close()


def _ours(
    goal: Goal,
    begin: Callable[[Any], Awaitable[Any]],
    template: bool = False,
    loop_package: str | None = None,
) -> Sample:
    """``begin`` gets the package, or with ``template`` a process that has the target
    preloaded, and starts a worker.
    """
    afork = load("afork")

    async def main() -> Sample:
        source = afork
        if template:
            source = afork.Fork.new().require(afork_bench_target.__name__)
            await source.ready()

        async def start() -> None:
            await _until_eof(begin(source))

        first_ms = await first(start)
        return {
            **await measure(start, goal),
            "first_ms": first_ms,
            "versions": {"afork": version(afork)},
        }

    return run_async(main, loop_package)


def version(package: Any) -> str:
    return str(getattr(package, "__version__", "unknown"))


def afork_new(goal: Goal) -> Sample:
    """A function that needs no import, as Perl's ``CORE::exit`` needs none."""
    return _ours(goal, lambda afork: afork.Fork.new().run(NO_IMPORT))


def afork_new_uvloop(goal: Goal) -> Sample:
    return _ours(
        goal, lambda afork: afork.Fork.new().run(NO_IMPORT), loop_package="uvloop"
    )


def afork_import(goal: Goal) -> Sample:
    """Each worker imports the target's module by itself."""
    return _ours(goal, lambda afork: afork.Fork.new().run(TARGET))


def afork_preloaded(goal: Goal) -> Sample:
    """The target is in the template already, as it is in multiprocessing's preloaded
    forkserver.
    """
    return _ours(goal, lambda process: process.fork().run(TARGET), template=True)


def afork_exec(goal: Goal) -> Sample:
    return _ours(goal, lambda afork: afork.Fork.new_exec().run(NO_IMPORT))
