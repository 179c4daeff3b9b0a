"""From the request to the first byte of user code, in one application process.

``python -c "import first; first.main()" WAY PATTERN ...``: a way is how a worker is
started, a pattern how many are asked for and when. The application is one of asyncio,
as ours are: what each way does to reach the byte includes the loop's part. Prints one
line of JSON as every other contender does: ``us`` are the microseconds of each start.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import afork_bench_target
import app
from meter import Sample

TICKS = os.sysconf("SC_CLK_TCK")
CODE = """
import os
def first(sock): os.write(sock.fileno(), b"x")
def sleep(sock): sock.send(b"x"); sock.recv(1)
"""
#: What a program run as a script has to say, without site: the fastest there is.
SCRIPT = "import os; os.write(1, b'x')"

Start = Callable[[], Awaitable[None]]


class Way:
    """How to start a worker: ``start`` returns with its first byte.

    ``server`` is the process whose children the workers are, where there is one;
    ``left`` are what has to be waited for afterwards, outside of what is measured.
    """

    server: int | None = None
    template: Any = None

    def __init__(self) -> None:
        self.left: list[Callable[[], object]] = []

    async def byte(self, sock: socket.socket) -> None:
        """The first byte from user code; then the worker ends."""
        if await asyncio.get_running_loop().sock_recv(sock, 1) != b"x":
            raise RuntimeError("the worker ended without its byte")
        self.left.append(sock.close)

    def reap(self) -> None:
        while self.left:
            self.left.pop()()

    async def start(self) -> None:
        raise NotImplementedError

    def cpu(self) -> float:
        """CPU seconds of the application, the server and the workers that ended."""
        found = time.process_time()
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        found += usage.ru_utime + usage.ru_stime
        if self.server is not None:
            stat = Path(f"/proc/{self.server}/stat").read_text().rpartition(")")[2]
            found += sum(map(int, stat.split()[11:15])) / TICKS
        return found


class Afork(Way):
    async def start(self) -> None:
        await self.byte(await self.template.fork().run("first"))


class OsFork(Way):
    async def start(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        if (pid := os.fork()) == 0:
            os.write(theirs.fileno(), b"x")
            os._exit(0)
        theirs.close()
        self.left.append(lambda: os.waitpid(pid, 0))
        await self.byte(ours)


class Multiprocessing(Way):
    def __init__(self, method: str) -> None:
        super().__init__()
        self._context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload([afork_bench_target.__name__])

    async def start(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=afork_bench_target.first, args=(theirs,))
        process.start()
        theirs.close()
        self.left.append(process.join)
        sock = socket.socket(fileno=os.dup(ours.fileno()))
        sock.setblocking(False)
        ours.close()
        await self.byte(sock)
        if self.server is None:
            server: Any = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
            self.server = server._forkserver_pid


class Subprocess(Way):
    async def start(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        process = subprocess.Popen(  # noqa: ASYNC220 - that it blocks is measured
            [sys.executable, "-I", "-S", "-c", SCRIPT], stdout=theirs
        )
        theirs.close()
        self.left.append(process.wait)
        await self.byte(ours)


class Thread(Way):
    async def start(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        thread = threading.Thread(target=afork_bench_target.first, args=(theirs,))
        thread.start()
        self.left += [theirs.close, thread.join]
        await self.byte(ours)


class IdlePool(Way):
    """No start at all: a worker of a pool that waits for work."""

    def __init__(self) -> None:
        super().__init__()
        context = multiprocessing.get_context("forkserver")
        self._pool = concurrent.futures.ProcessPoolExecutor(1, context)

    async def start(self) -> None:
        await asyncio.wrap_future(self._pool.submit(afork_bench_target.echo, 1))


@contextlib.asynccontextmanager
async def opened(name: str, depth: int) -> AsyncIterator[Way]:
    """The way of this name, with one worker started and gone."""
    simple: dict[str, Callable[[], Way]] = {
        "os-fork": OsFork,
        "forkserver": lambda: Multiprocessing("forkserver"),
        "spawn": lambda: Multiprocessing("spawn"),
        "subprocess": Subprocess,
        "thread": Thread,
        "idle-pool": IdlePool,
    }
    if name in simple:
        way = simple[name]()
    else:
        import afork

        way = Afork()
        way.template = await afork.Fork.new_exec().eval(CODE).ready()
        way.server = way.template.pid
    await way.start()
    way.reap()
    if depth:
        way.template.spares(depth)
        await refilled(way, depth)
    yield way
    if way.template is not None:
        way.template.close()
        await way.template.wait()


async def refilled(way: Way, depth: int) -> None:
    # They tell nobody: there is no event to wait for.
    while (await way.template.stats())["spares"]["ready"] < depth:  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def timed(way: Way, begin: float, us: list[float]) -> None:
    await way.start()
    us.append((time.perf_counter() - begin) * 1e6)


async def one(way: Way, args: argparse.Namespace, us: list[float]) -> None:
    """One at a time, with a pause in which the last one ends."""
    until = time.perf_counter() + args.seconds
    while len(us) < args.count if args.count else time.perf_counter() < until:
        await asyncio.sleep(args.gap)
        await timed(way, time.perf_counter(), us)
        way.reap()


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
        way.reap()


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
        way.reap()  # else the descriptors of all would be kept
    if tasks:
        await asyncio.wait(tasks)
    way.reap()


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
        for sock in sleeping:
            sock.close()
    return sample


def main() -> None:
    parser = argparse.ArgumentParser(prog="first")
    parser.add_argument("way")
    parser.add_argument("pattern", choices=PATTERNS)
    parser.add_argument("--size", type=int, default=1, help="of a burst, or a second")
    parser.add_argument("--depth", type=int, default=0, help="spares")
    parser.add_argument("--live", type=int, default=0, help="workers that sleep")
    parser.add_argument("--mb", type=int, default=20)
    parser.add_argument("--gap", type=float, default=0.0, help="seconds between")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--count", type=int, default=0)
    args = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    ballast = app.grow(args.mb)
    time.sleep(args.mb * 2e-4)  # the machine is still busy with so much
    sample = asyncio.run(measure(args))
    del ballast  # alive until here
    os.write(1, json.dumps(sample).encode() + b"\n")


if __name__ == "__main__":
    main()
