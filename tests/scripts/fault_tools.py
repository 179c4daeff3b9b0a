"""What the fault tests share: stop-points, process handles, a look at the log.

A stop-point is a FIFO: the process that reaches it writes its pid there and
waits to be killed. So nothing is timed, and nothing sleeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HANG = 10.0

#: Code that stops whoever executes it at the FIFO {path!r}.
STOP = """
import os as _os, signal as _signal
_fd = _os.open({path!r}, _os.O_WRONLY)
_os.write(_fd, b"%d\\n" % _os.getpid())
_os.close(_fd)
while True:
    _signal.pause()
"""

#: What shows that the next request works.
ECHO = """
def echo(sock, *args):
    sock.sendall(repr(args).encode())
"""


class StopPoint:
    """A place in the life of a process, to wait for and to be killed at."""

    def __init__(self, directory: Path, name: str = "stop") -> None:
        self.path = str(directory / name)
        os.mkfifo(self.path)
        self.fd = os.open(self.path, os.O_RDWR | os.O_NONBLOCK)
        self.code = STOP.format(path=self.path)

    def hook(self, when: str) -> str:
        """Code that stops at a fork: "before" or "after_in_child", once."""
        body = "\n    ".join(self.code.strip().splitlines())
        return (
            f"import os\n_armed = [1]\ndef _stop():\n"
            f"    if not _armed: return\n    _armed.clear()\n    {body}\n"
            f"os.register_at_fork({when}=_stop)\n"
        )

    async def reached(self) -> int:
        """Wait for somebody to get there; who."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        loop.add_reader(self.fd, lambda: future.done() or future.set_result(None))
        try:
            await future
        finally:
            loop.remove_reader(self.fd)
        return int(os.read(self.fd, 100))

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def stop(tmp_path: Path) -> Iterator[StopPoint]:
    point = StopPoint(tmp_path)
    yield point
    point.close()


def suspend(pid: int) -> None:
    """Stop a child of ours, and return when it has stopped."""
    os.kill(pid, signal.SIGSTOP)
    done = os.waitid(os.P_PID, pid, os.WSTOPPED)
    assert done is not None
    assert done.si_status == signal.SIGSTOP


def descriptors_of(pid: int) -> dict[int, str]:
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
    return found


def children_of(pid: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def rss() -> int:
    """Resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def wait_pidfd(pidfd: int) -> bool:
    """Whether the process has ended, after waiting for it."""
    return bool(select.select([pidfd], [], [], HANG)[0])


@contextlib.contextmanager
def subreaper() -> Iterator[None]:
    """Orphans of our children become ours; all are reaped at the end."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER
    try:
        yield
    finally:
        libc.prctl(36, 0, 0, 0, 0)
        while True:
            try:
                if os.waitpid(-1, os.WNOHANG) == (0, 0):
                    break
            except ChildProcessError:
                break


def start_script(name: str, *args: str, **kwargs: Any) -> subprocess.Popen[str]:
    """A script of this folder, in a fresh interpreter, to be talked to."""
    return subprocess.Popen(
        [sys.executable, "-u", str(Path(__file__).parent / name), *args],
        stdout=subprocess.PIPE,
        text=True,
        **kwargs,
    )


class Log(logging.Handler):
    """What goes to the logger "afork" during a test."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture(autouse=True)
def log() -> Iterator[Log]:
    """Fails a test with log lines that it has not taken out (log.lines.clear())."""
    handler = Log()
    logger = logging.getLogger("afork")
    logger.addHandler(handler)
    yield handler
    gc.collect()
    logger.removeHandler(handler)
    assert not handler.lines, f"logged: {handler.lines}"
