"""What the benchmark's workers run.

Next to nothing. A module of its own: importing it is cheap, and can be preloaded.
"""

from __future__ import annotations

import os

PAGE = 4096


def leave(sock: object = None) -> None:
    """Return at once: the worker ends, and the application reads EOF."""


def echo(x: object) -> object:
    """The smallest call."""
    return x


def touch(buffer: object) -> int:
    """Read a byte of each page: memory that is mapped lazily is not free."""
    view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
    return len(view[::PAGE].tobytes())


def ends(buffer: object) -> int:
    """Use the memory, but not all of it: whatever grows with its size is the call's."""
    view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
    view[0] = 1
    return view[len(view) - 1]


def meet(address: str) -> int:
    """Tell the application that this process is at work, and wait for its word.

    Or for its end: a process that waits here is never left behind.
    """
    import socket  # not at the top: it is as dear as several starts

    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(address)
        sock.sendall(os.getpid().to_bytes(8, "little"))
        sock.recv(1)
    return os.getpid()


def first(connection: object) -> None:
    """Send the byte by which a worker counts as started."""
    os.write(connection.fileno(), b"x")  # type: ignore[attr-defined]


def say(path: str) -> None:
    """The same at a FIFO."""
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, b"x")
    os.close(fd)


def hold(folder: str) -> None:
    """Tell the process id at one FIFO, and wait at another for its writers' end."""
    wait = os.open(f"{folder}/wait", os.O_RDONLY)
    tell = os.open(f"{folder}/tell", os.O_WRONLY)
    os.write(tell, b"%8d" % os.getpid())
    os.close(tell)
    os.read(wait, 1)
