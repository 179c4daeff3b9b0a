"""What a worker writes to its standard output or error, read on a loop."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import select
import sys
import termios
import weakref
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from .._handles import is_stream

#: Bytes handled in one wake-up of the loop.
CHUNK = 64 * 1024
#: Bytes of a line; what is longer comes in pieces.
LINE_MAX = 64 * 1024
#: Bytes waiting for a slow descriptor, from which on no more are read.
BUFFER_MAX = 1024 * 1024
#: Bytes that tail() remembers.
TAIL_MAX = 4096

#: Called with each line; or a descriptor that gets the bytes; or neither.
Sink: TypeAlias = "Callable[[str], object] | int | None"
#: What a descriptor is known by: the loop, the number, and the file behind it.
_Key: TypeAlias = "tuple[object, ...]"


class OutputPipe:
    """A pipe that a worker writes to, and what becomes of the bytes.

    Send ``write_fd`` to the worker, then call `close_write`: a second copy
    would hide the end of file. Belongs to the loop's thread.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, sink: Sink) -> None:
        """Make the pipe and read it on a loop from now on.

        Args:
            loop: The loop that reads.
            sink: A function, called with each line as text: UTF-8, what is
                not shown as U+FFFD, without the newline. A line of more than
                64 KiB comes in pieces; at the end, what lacks its newline
                comes as well. Or the number of a descriptor, which is
                duplicated and gets the bytes as they are. Or None, or 1 or 2
                where that stream has been closed: only `tail` knows them.

        Raises:
            TypeError: the sink is none of these.
            OSError: EMFILE; EBADF if there is no such descriptor, or not for writing.
            ValueError: a negative number.
        """
        #: The worker's end of the pipe, or -1 once it is closed here.
        self.write_fd = self._read_fd = -1
        self._loop = loop
        self._callback: Callable[[str], object] | None = None
        self._file: _File | None = None
        self._using = False
        self._paused = False
        self._tail = b""
        #: The line that is still without its end.
        self._rest = bytearray()
        #: Lines that the function has not been called with.
        self._lines: deque[bytes] = deque()
        self._calling = False
        if callable(sink):
            self._callback = sink
        elif isinstance(sink, int) and not isinstance(sink, bool):
            # Where 1 or 2 was closed, the number may be one of our sockets.
            if sink not in (1, 2) or is_stream(sink):
                self._file = _File.of(loop, sink)
                self._file.users += 1
                self._using = True
        elif sink is not None:
            raise TypeError(
                f"a function, descriptor or None is needed, not {type(sink).__name__}"
            )
        try:
            self._read_fd, self.write_fd = os.pipe()
            # Ours alone: the worker's end is another open file.
            os.set_blocking(self._read_fd, False)
            loop.add_reader(self._read_fd, self._readable)
        except BaseException:
            self._release()
            raise

    def close_write(self) -> None:
        """Close our copy of the worker's end; again does no harm."""
        if self.write_fd >= 0:
            fd, self.write_fd = self.write_fd, -1
            os.close(fd)

    def tail(self) -> str:
        """The last 4 KiB that were written, as text.

        What is in the pipe at the moment is read first. The end of file is
        not waited for: a program that the worker has started may have the
        pipe open.
        """
        self._drain()
        start = 0
        if len(self._tail) == TAIL_MAX:
            # The first character may have been cut.
            while start < 3 and self._tail[start] & 0xC0 == 0x80:
                start += 1
        return self._tail[start:].decode("utf-8", "replace")

    def close(self) -> None:
        """Read what is in the pipe at the moment, then close it.

        Whoever still writes to it gets EPIPE. A function that is the sink
        gets the unfinished line; what a slow descriptor has not taken yet
        goes on to be written: see `wait_closed`. Again does no harm.
        """
        self.close_write()
        if self._loop.is_closed():
            self._release()
        else:
            self._drain()
            self._end()

    async def wait_closed(self, patience: float | None = None) -> None:
        """Wait until a descriptor that is the sink has got every byte.

        Cancelling it gives nothing up.

        Args:
            patience: Seconds without a byte taken after which it is waited
                for no longer; None for as long as nobody reads what the
                descriptor leads to.
        """
        if self._file is not None:
            await self._file.written(patience)

    def __del__(self) -> None:
        self._release()

    # -- reading

    def _readable(self) -> None:
        if data := os.read(self._read_fd, CHUNK):
            self._take(data)
        else:
            self._end()

    def _drain(self) -> None:
        """Read as much as there is now, however fast somebody writes more."""
        if self._read_fd < 0:
            return
        count = bytearray(4)
        fcntl.ioctl(self._read_fd, termios.FIONREAD, count)
        left = int.from_bytes(count, sys.byteorder)
        while left > 0 and self._read_fd >= 0:  # a callback may close it
            data = os.read(self._read_fd, min(left, CHUNK))
            left -= len(data)
            self._take(data)

    def _take(self, data: bytes) -> None:
        self._tail = (self._tail + data[-TAIL_MAX:])[-TAIL_MAX:]
        if self._callback is not None:
            self._split(data)
        elif self._file is not None:
            self._file.write(data)
            if self._file.full and not self._paused:
                # The pipe fills up then, and the worker waits.
                self._paused = True
                self._loop.remove_reader(self._read_fd)
                self._file.paused.append(self)

    def _resume(self) -> None:
        self._paused = False
        if self._read_fd >= 0 and not self._loop.is_closed():
            self._loop.add_reader(self._read_fd, self._readable)

    def _end(self) -> None:
        """No more to be read: the end of file, or closed."""
        if self._rest:
            self._lines.append(bytes(self._rest))
            self._rest.clear()
        self._release()
        self._call()

    def _release(self) -> None:
        """Let go of what is open; safe on what was only half made."""
        if self._read_fd >= 0:
            fd, self._read_fd = self._read_fd, -1
            if not self._loop.is_closed():
                self._loop.remove_reader(fd)
            os.close(fd)
        self.close_write()
        if self._file is not None and self._using:
            self._using = False
            self._file.leave()

    def abandon(self) -> None:
        """In a forked child of the application: close, touch no loop."""
        self._using = False
        for fd in (self._read_fd, self.write_fd):
            if fd >= 0:
                os.close(fd)
        self._read_fd = self.write_fd = -1
        if self._file is not None:
            self._file.abandon()

    # -- lines

    def _split(self, data: bytes) -> None:
        lines = data.split(b"\n")
        self._rest += lines[0]
        if len(lines) > 1:
            self._lines.append(bytes(self._rest))
            self._lines.extend(lines[1:-1])
            self._rest[:] = lines[-1]
        while len(self._rest) > LINE_MAX:
            end = _border(self._rest)
            self._lines.append(bytes(self._rest[:end]))
            del self._rest[:end]
        self._call()

    def _call(self) -> None:
        # The function may call tail() or close(), which get here: what they
        # find must wait for its turn.
        if self._calling or self._callback is None:
            return
        self._calling = True
        try:
            while self._lines:
                line = self._lines.popleft()
                while len(line) > LINE_MAX:
                    end = _border(line)
                    self._call_with(self._callback, line[:end])
                    line = line[end:]
                self._call_with(self._callback, line)
        finally:
            self._calling = False

    def _call_with(self, callback: Callable[[str], object], line: bytes) -> None:
        try:
            callback(line.decode("utf-8", "replace"))
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:  # as asyncio does with its callbacks
            self._loop.call_exception_handler(
                {
                    "message": f"Exception in {callback!r}, called with a line "
                    "of a worker's output",
                    "exception": exc,
                }
            )


def _border(data: bytes | bytearray) -> int:
    """Where to cut a line that is too long: not inside a character."""
    for end in range(LINE_MAX, LINE_MAX - 4, -1):
        if data[end] & 0xC0 != 0x80:
            return end
    return LINE_MAX


class _File:
    """A descriptor of the application that gets the bytes of workers.

    It may be slow, and it may be blocking: its flags cannot be changed, as
    they are shared with the terminal's other users. So it is written to only
    when poll(2) says that there is room, and no more than PIPE_BUF bytes,
    which a pipe with room takes at once.

    The loop does not watch it but an epoll instance that does, since uvloop
    makes non-blocking what it watches.

    One serves all pipes of a loop that lead to the same descriptor, so that a
    pool needs two more descriptors and not two for each worker.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, fd: int, key: _Key) -> None:
        self.loop = loop
        self.key = key
        #: Open pipes that lead here.
        self.users = 0
        #: Those that wait until there is room.
        self.paused: list[OutputPipe] = []
        self._buffer: deque[memoryview] = deque()
        self._count_taken = 0
        self._count_written = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._watched = False
        self._broken = False
        self._epoll: select.epoll | None = None
        self._fd = os.dup(fd)
        epoll = select.epoll()  # if it raises, __del__ closes the other
        try:
            epoll.register(self._fd, select.EPOLLOUT)
        except PermissionError:
            epoll.close()  # files on disk and /dev/null never make one wait
        else:
            self._epoll = epoll
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop, fd: int) -> _File:
        """The one for a descriptor: found, or made."""
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "the descriptor is not open for writing")
        # Another file may have got the number since.
        status = os.fstat(fd)
        key = (loop, fd, status.st_dev, status.st_ino)
        found = _files.get(key)
        if found is None:
            found = cls(loop, fd, key)
            _files[key] = found
        return found

    @property
    def size(self) -> int:
        return self._count_taken - self._count_written

    @property
    def full(self) -> bool:
        return self.size >= BUFFER_MAX

    def write(self, data: bytes) -> None:
        if not self._broken:
            self._buffer.append(memoryview(data))
            self._count_taken += len(data)
            if not self._watched:
                self._flush()

    def leave(self) -> None:
        self.users -= 1
        self._settle()

    async def written(self, patience: float | None) -> None:
        """Wait until everything that is waiting now has been written.

        Or until nothing is any more; see `OutputPipe.wait_closed`.
        """
        if self.size and self._fd >= 0:
            future: asyncio.Future[None] = self.loop.create_future()
            self._waiting.append((self._count_taken, future))
            before = -1
            while not future.done() and before != self._count_written:
                before = self._count_written
                await asyncio.wait([future], timeout=patience)

    def _flush(self) -> None:
        # A file on disk cannot be watched, so all is written at once.
        budget = CHUNK if self._epoll is not None else self.size
        try:
            while self._buffer and budget > 0 and self._poll.poll(0):
                data = self._buffer[0]
                count = os.write(self._fd, data[: select.PIPE_BUF])
                self._count_written += count
                budget -= count
                if count < len(data):
                    self._buffer[0] = data[count:]
                else:
                    self._buffer.popleft()
        except BlockingIOError as exc:  # somebody has made it non-blocking
            if self._epoll is None:
                self._break(exc)
        except OSError as exc:
            self._break(exc)
        self._settle()

    def _break(self, exc: OSError) -> None:
        """It takes nothing any more: the reader has gone, the disk is full."""
        self._broken = True
        self._buffer.clear()
        self._count_written = self._count_taken
        self.loop.call_exception_handler(
            {
                "message": "the output of workers cannot be written any more",
                "exception": exc,
            }
        )

    def _settle(self) -> None:
        """Watch or not, wake up whoever waits, and end after the last use."""
        if self._fd < 0:
            return
        watch = bool(self._buffer) and not self.loop.is_closed()
        if self._epoll is not None and watch != self._watched:
            self._watched = watch
            if watch:
                self.loop.add_reader(self._epoll.fileno(), self._flush)
            elif not self.loop.is_closed():
                self.loop.remove_reader(self._epoll.fileno())
        if self.size <= BUFFER_MAX // 2:
            paused, self.paused = self.paused, []
            for pipe in paused:
                pipe._resume()
        while self._waiting and self._waiting[0][0] <= self._count_written:
            future = self._waiting.popleft()[1]
            if not future.done():
                future.set_result(None)
        if not self.users and not watch:
            self._close()

    def abandon(self) -> None:
        """In a forked child: what is still to be written is its parent's."""
        self._buffer.clear()
        self._broken = True
        if self._fd >= 0:
            self._close()

    def _close(self) -> None:
        if _files.get(self.key) is self:
            del _files[self.key]
        if self._epoll is not None:
            self._epoll.close()
        fd, self._fd = self._fd, -1
        os.close(fd)

    def __del__(self) -> None:
        fd, self._fd = getattr(self, "_fd", -1), -1  # users' come later in a cycle
        if fd >= 0:
            os.close(fd)


_files: weakref.WeakValueDictionary[_Key, _File] = weakref.WeakValueDictionary()
