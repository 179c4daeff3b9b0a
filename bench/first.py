"""From the request to the first byte of user code, in one application process.

``python -c "import first; first.main()" WAY PATTERN ...``: a way is how a worker is
started (ways.py, floors.py), a pattern how many are asked for and when. Prints one line
of JSON as every other contender does: ``us`` are the microseconds of each start.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import socket
import time
from collections.abc import AsyncIterator, Awaitable
from statistics import median
from typing import Any

import app
from floors import FEW, FLOORS
from meter import Sample, Unavailable
from peers import loop_factory
from ways import WAYS, Way


@contextlib.asynccontextmanager
async def opened(name: str, depth: int) -> AsyncIterator[Way]:
    """The way of this name, with one worker started and gone."""
    way = {**WAYS, **FLOORS}[name]()
    await way.open()
    await way.start()
    await way.reap()
    if depth:
        way.template.spares(depth)
        await way.refilled(depth)
    yield way
    await way.close()


async def timed(way: Way, begin: float, us: list[float]) -> None:
    await way.start()
    us.append((time.perf_counter() - begin) * 1e6)


async def one(way: Way, args: argparse.Namespace, us: list[float]) -> None:
    """One at a time, with a pause in which the last one ends."""
    until = time.perf_counter() + args.seconds
    while len(us) < args.count if args.count else time.perf_counter() < until:
        await asyncio.sleep(args.gap)
        await timed(way, time.perf_counter(), us)
        await way.reap()


async def brisk(way: Way, args: argparse.Namespace) -> float:
    """The median without a pause, a few at a time: no more than there are spares."""
    us: list[float] = []
    few = args.depth or FEW
    until = time.perf_counter() + args.brisk
    while not us or time.perf_counter() < until:
        await way.refilled(args.depth)
        for at in range(few):
            if at and not args.depth and time.perf_counter() > until:
                break  # of the slow ones one is enough
            await timed(way, time.perf_counter(), us)
        await way.reap()
    return median(us)


async def burst(way: Way, args: argparse.Namespace, us: list[float]) -> None:
    """``size`` at once, counted from when the first of them was asked for."""
    until = time.perf_counter() + args.seconds
    while not us or time.perf_counter() < until:
        await asyncio.sleep(args.gap)
        begin = time.perf_counter()
        if args.way == "afork":
            runs = [f.run("first") for f in way.template.fork_many(args.size)]

            async def byte(run: Awaitable[Any], begin: float = begin) -> None:
                await way.byte(await run)
                us.append((time.perf_counter() - begin) * 1e6)

            await asyncio.gather(*map(byte, runs))
        else:
            await asyncio.gather(*(timed(way, begin, us) for _ in range(args.size)))
        await way.reap()


async def rate(way: Way, args: argparse.Namespace, us: list[float]) -> None:
    """``size`` per second, each counted from when it was due, late or not."""
    begin = due = time.perf_counter()
    tasks: set[asyncio.Task[None]] = set()
    while due - begin < args.seconds:
        if (early := due - time.perf_counter()) > 0:
            await asyncio.sleep(early)
            continue
        tasks.add(task := asyncio.create_task(timed(way, due, us)))
        task.add_done_callback(tasks.discard)
        due += 1 / args.size
        await asyncio.sleep(0)  # it begins now, however late we are
        await way.reap()  # else the descriptors of all would be kept
    if tasks:
        await asyncio.wait(tasks)
    await way.reap()


PATTERNS = {"one": one, "burst": burst, "open": rate}


async def measure(args: argparse.Namespace) -> Sample:
    us: list[float] = []
    async with opened(args.way, args.depth) as way:
        sleeping: list[socket.socket] = []
        while len(sleeping) < args.live:
            forks = way.template.fork_many(min(500, args.live - len(sleeping)))
            sleeping += [await f.run("sleep") for f in forks]
        for sock in sleeping:
            await asyncio.get_running_loop().sock_recv(sock, 1)
        cpu, begin = way.cpu(), time.perf_counter()
        await PATTERNS[args.pattern](way, args, us)
        seconds = time.perf_counter() - begin
        sample: Sample = {"n": len(us), "seconds": seconds, "us": us}
        sample["cpu_us"] = (way.cpu() - cpu) * 1e6 / max(len(us), 1)
        if args.depth:
            told = (await way.template.stats())["spares"]
            asked = told["hits"] + told["misses"]
            sample["hits"] = told["hits"] / max(asked, 1)
        if args.brisk:
            sample["brisk_us"] = await brisk(way, args)
        for sock in sleeping:
            sock.close()
    return sample


def run(args: argparse.Namespace) -> Sample:
    try:
        with asyncio.Runner(loop_factory=loop_factory(args.loop)) as runner:
            return runner.run(measure(args))
    except Unavailable as reason:
        return {"skip": str(reason)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="first")
    parser.add_argument("way")
    parser.add_argument("pattern", choices=PATTERNS)
    parser.add_argument("--size", type=int, default=1, help="of a burst, or a second")
    parser.add_argument("--depth", type=int, default=0, help="spares")
    parser.add_argument("--live", type=int, default=0, help="workers that sleep")
    parser.add_argument("--mb", type=int, default=20)
    parser.add_argument("--gap", type=float, default=0.0, help="seconds between")
    parser.add_argument("--brisk", type=float, default=0.0, help="seconds without")
    parser.add_argument("--loop", help="the package of another event loop")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--count", type=int, default=0)
    args = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    ballast = app.grow(args.mb)
    time.sleep(args.mb * 2e-4)  # the machine is still busy with so much
    sample = run(args)
    del ballast  # alive until here
    os.write(1, json.dumps(sample).encode() + b"\n")


if __name__ == "__main__":
    main()
