"""Floors of a start from a spare: a Python process that waits, and nothing between.

As ways.py has them; each adds one thing to the one before. The application has a
socket to the waiting process itself, so there is no template on the way, no fork, and
no bookkeeping of a library. What remains is what a start by that means costs at best.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys

from ways import Way

FEW = 4  # processes that wait, where each serves once
#: A process that waits for the name of a function, looks it up and calls it with the
#: descriptor that came along, or else with the socket itself. ``serve``: again and
#: again. ``spares``: makes such processes, each for one call, which it has practised.
CHILD = """
import _signal, _socket, os, sys

def connection(fd):
    return _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fd)

def rights(fd):
    data = fd.to_bytes(4, sys.byteorder)
    return [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, data)]

def first(sock):
    os.write(sock.fileno(), b"x")

def call(link):
    name, control, _, _ = link.recvmsg(64, 64)
    if not name:
        os._exit(0)
    sock = link
    if control:
        sock = connection(int.from_bytes(control[0][2][:4], sys.byteorder))
    globals()[name.decode()](sock)

def serve(link):
    while True:
        call(link)

def practise():
    a, b = _socket.socketpair()
    c, d = _socket.socketpair()
    a.sendmsg([b"first"], rights(d.fileno()))
    call(b)

def spares(link):
    _signal.signal(_signal.SIGCHLD, _signal.SIG_IGN)
    while link.recv(1):
        ours, theirs = _socket.socketpair()
        if os.fork() == 0:
            link.close()
            theirs.close()
            practise()
            call(ours)
            os._exit(0)
        link.sendmsg([b"x"], rights(theirs.fileno()))
        ours.close()
        theirs.close()

globals()[sys.argv[1]](connection(0))
"""


class Blocking(Way):
    """Without the event loop: send, then block."""

    role = "serve"
    blocking = True

    async def open(self) -> None:
        self.link, theirs = socket.socketpair()
        self.link.setblocking(self.blocking)
        self._process = subprocess.Popen(  # noqa: ASYNC220 - before anything is timed
            [sys.executable, "-I", "-S", "-c", CHILD, self.role], stdin=theirs
        )
        theirs.close()

    async def close(self) -> None:
        self.link.close()
        self._process.wait()

    async def start(self) -> None:
        self.link.send(b"first")
        if self.link.recv(1) != b"x":
            raise RuntimeError("the process ended without its byte")


class Loop(Blocking):
    """The loop's own coroutines for sockets."""

    blocking = False

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.link, b"first")
        if await loop.sock_recv(self.link, 1) != b"x":
            raise RuntimeError("the process ended without its byte")


class Reader(Blocking):
    """A callback that the loop has from the beginning."""

    blocking = False
    _come: asyncio.Future[bytes]

    async def open(self) -> None:
        await super().open()
        loop = asyncio.get_running_loop()
        loop.add_reader(self.link, lambda: self._come.set_result(self.link.recv(1)))

    async def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.link)
        await super().close()

    async def start(self) -> None:
        self._come = asyncio.get_running_loop().create_future()
        self.link.send(b"first")
        if await self._come != b"x":
            raise RuntimeError("the process ended without its byte")


class Passing(Blocking):
    """What every start must do besides: make a socket pair, and pass one end."""

    async def start(self) -> None:
        await self.ask(self.link)

    async def ask(self, link: socket.socket) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        fd = theirs.fileno().to_bytes(4, sys.byteorder)
        link.sendmsg([b"first"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fd)])
        theirs.close()
        await self.byte(ours)


class Once(Passing):
    """Each process serves once, forked by another and warm: spares without ours."""

    role = "spares"

    def __init__(self) -> None:
        super().__init__()
        self._ready: list[socket.socket] = []

    async def open(self) -> None:
        await super().open()
        await self.refilled(FEW)

    async def refilled(self, depth: int) -> None:
        while len(self._ready) < FEW:
            self._more()
        await asyncio.sleep(0.005)  # the last of them has practised

    def _more(self) -> None:
        self.link.send(b"1")
        _, (fd,), _, _ = socket.recv_fds(self.link, 1, 1)
        self._ready.append(socket.socket(fileno=fd))

    async def start(self) -> None:
        link = self._ready.pop(0)
        self.left += [link.close, self._more]
        await self.ask(link)

    async def close(self) -> None:
        for link in self._ready:
            link.close()
        await super().close()


FLOORS = {
    "floor-blocking": Blocking,
    "floor-loop": Loop,
    "floor-reader": Reader,
    "floor-pass": Passing,
    "floor-once": Once,
}
