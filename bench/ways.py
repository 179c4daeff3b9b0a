"""Ways to start a worker from an application of asyncio, up to its first byte.

A way's ``start`` returns with the first byte of user code. Each is used as its users
use it: what it does to reach that byte includes the event loop's part.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import afork_bench_target as target
from peers import load

TICKS = os.sysconf("SC_CLK_TCK")
CODE = """
import os
def first(sock): os.write(sock.fileno(), b"x")
def sleep(sock): sock.send(b"x"); sock.recv(1)
"""
#: What a program run as a script has to say, without site: the fastest there is.
SCRIPT = "import os; os.write(1, b'x')"


class Way:
    """How to start a worker.

    ``server`` is the process whose children the workers are, where there is one;
    ``left`` are what has to be called, and waited for, outside of what is measured.
    """

    server: int | None = None
    template: Any = None

    def __init__(self) -> None:
        self.left: list[Callable[[], object]] = []

    async def open(self) -> None:
        """Whatever an application does once."""

    async def close(self) -> None:
        """The opposite of open()."""

    async def start(self) -> None:
        """Returns with the first byte of user code."""
        raise NotImplementedError

    async def byte(self, sock: socket.socket) -> None:
        """The first byte from user code; then the worker ends."""
        if await asyncio.get_running_loop().sock_recv(sock, 1) != b"x":
            raise RuntimeError("the worker ended without its byte")
        self.left.append(sock.close)

    async def reap(self) -> None:
        while self.left:
            found = self.left.pop()()
            if inspect.isawaitable(found):
                await found

    async def refilled(self, depth: int) -> None:
        """Returns when so many spares wait, where there are spares."""

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
    async def open(self) -> None:
        self.template = await load("afork").Fork.new_exec().eval(CODE).ready()
        self.server = self.template.pid

    async def close(self) -> None:
        self.template.close()
        await self.template.wait()

    async def start(self) -> None:
        await self.byte(await self.template.fork().run("first"))

    async def refilled(self, depth: int) -> None:
        if not depth:
            return
        # They tell nobody: there is no event to wait for.
        while (await self.template.stats())["spares"]["ready"] < depth:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


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
    """Processes of multiprocessing, or of what has been copied from it."""

    def __init__(self, method: str, package: str = "multiprocessing") -> None:
        super().__init__()
        self._package = load(package)
        self._context = self._package.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload([target.__name__])

    async def start(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=target.first, args=(theirs,))
        process.start()
        theirs.close()
        self.left.append(process.join)
        sock = socket.socket(fileno=os.dup(ours.fileno()))
        sock.setblocking(False)
        ours.close()
        await self.byte(sock)
        if self.server is None and self._package is multiprocessing:
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
        thread = threading.Thread(target=target.first, args=(theirs,))
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
        await asyncio.wrap_future(self._pool.submit(target.echo, 1))


class Fifo(Way):
    """Of what passes no descriptors: the worker's byte comes through a FIFO."""

    async def open(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="afork-bench-")
        self.path = str(Path(self._folder.name, "first"))
        os.mkfifo(self.path)
        # With an end to write to, it never reads the end of the file.
        self._fd = os.open(self.path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._come = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._fd, self._read)

    def _read(self) -> None:
        os.read(self._fd, 1)
        self._come.set()

    async def come(self) -> None:
        await self._come.wait()
        self._come.clear()

    async def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)
        self._folder.cleanup()


class Pebble(Fifo):
    """Its decorator for asyncio: each call has a process of its own."""

    async def open(self) -> None:
        await super().open()
        load("pebble")
        from pebble import asynchronous

        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pebble", target.__name__])
        self._say = asynchronous.process(context=context)(target.say)

    async def start(self) -> None:
        future = self._say(self.path)
        self.left.append(lambda: future)
        await self.come()


class Loky(Fifo):
    """It has no processes without a pool: one of one worker, which is shut down."""

    async def start(self) -> None:
        pool = load("loky").ProcessPoolExecutor(1)
        self.left.append(pool.shutdown)
        pool.submit(target.say, self.path)
        await self.come()


WAYS: dict[str, Callable[[], Way]] = {
    "afork": Afork,
    "os-fork": OsFork,
    "forkserver": lambda: Multiprocessing("forkserver"),
    "spawn": lambda: Multiprocessing("spawn"),
    "billiard": lambda: Multiprocessing("forkserver", "billiard"),
    "pebble": Pebble,
    "loky": Loky,
    "subprocess": Subprocess,
    "thread": Thread,
    "idle-pool": IdlePool,
}
