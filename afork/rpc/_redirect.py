"""Where the standard streams of a worker lead.

Descriptors are redirected, not Python's objects, so that what C code and
programs write goes the same way. Loaded by every worker: imports next to
nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys

from .. import _afork
from .._child import flush

TYPE_CHECKING = False  # see afork/__init__.py
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, Self

#: Bytes of a captured stream that are kept.
CAPTURE_MAX = 16 * 1024 * 1024

_NAMES = {1: "stdout", 2: "stderr"}


def redirect(fd: int, number: int) -> None:
    """Make standard output or error lead to where a descriptor leads.

    What has been written before still goes to the old place. ``sys.stdout``
    and ``sys.stderr`` write each line at once from then on: a buffer would be
    lost when the worker is killed.

    Args:
        fd: Duplicated; the caller's own stays open.
        number: 1 or 2.

    Raises:
        OSError: EBADF.
        ValueError: another number.
    """
    name = _NAMES.get(number)
    if name is None:
        raise ValueError(f"1 or 2 is needed, not {number}")
    flush()
    if fd == number:
        os.set_inheritable(fd, True)
    else:
        os.dup2(fd, number)
    _repair(number)
    stream = getattr(sys, name)
    if getattr(stream, "reconfigure", None) is not None:
        stream.reconfigure(line_buffering=True)


def _repair(number: int) -> None:
    """A stream object where there is none, or a closed one."""
    name = _NAMES[number]
    stream: Any = getattr(sys, name)
    if stream is None or getattr(stream, "closed", False):
        stream = open(  # noqa: SIM115
            number,
            "w",
            buffering=1,
            encoding="utf-8",
            errors="backslashreplace",
            closefd=False,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


class Capture:
    """A context in which descriptors 1 and 2 lead into memory.

    Of the whole process: what other threads write, and programs that are
    still running from before, is not told apart. Programs that outlive the
    context go on to write into memory that nobody reads. As with any file,
    ``>/dev/stdout`` in a shell script empties it.

    The same object can be used for any number of calls, one at a time;
    different ones can be nested.

    Attributes:
        stdout: What was written to descriptor 1, once the context has been
            left; of more than 16 MiB the end.
        stderr: The same of descriptor 2.
        truncated: Whether one of them was longer.
    """

    __slots__ = (
        "_buffered",
        "_saved",
        "_streams",
        "files",
        "stderr",
        "stdout",
        "truncated",
    )

    def __init__(self) -> None:
        self.stdout = b""
        self.stderr = b""
        self.truncated = False
        #: Memory files for 1 and 2; empty outside of the context.
        self.files: list[int] = []
        #: Copies of 1 and 2 as they were; -1 for one that was closed.
        self._saved: list[int] = []
        self._streams: tuple[Any, ...] = ()
        #: Those of them that did not write each line at once.
        self._buffered: list[Any] = []

    def __enter__(self) -> Self:
        """Redirect both, or neither.

        ``sys.stdout`` and ``sys.stderr`` write each line at once meanwhile: a
        crash would lose what is in their buffers.

        Raises:
            OSError: no descriptor is left; everything is as it was.
            RuntimeError: the object is in use.
        """
        if self.files:
            raise RuntimeError("this Capture is in use")
        flush()
        self.stdout = self.stderr = b""
        self.truncated = False
        self._streams = (sys.stdout, sys.stderr)
        try:
            # Everything that may fail comes before the first change. Files of
            # their own for each call: a program that was left behind by the
            # last one still has its.
            for number, name in _NAMES.items():
                self.files.append(_memory_file(name))
                self._saved.append(_copy(number))
            for number, file in enumerate(self.files, 1):
                os.dup2(file, number)
            for stream in self._streams:
                if getattr(stream, "line_buffering", True) is False:
                    self._buffered.append(stream)
                    _buffer_lines(stream, True)
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            # The function may have closed 1 or 2, with text in the buffers.
            for number, file in enumerate(self.files, 1):
                os.dup2(file, number)
            for stream in (*self._streams, sys.stdout, sys.stderr):
                _flush_one(stream)
            _afork.flush_stdout()
            self.stdout, out_cut = contents(self.files[0])
            self.stderr, err_cut = contents(self.files[1])
            self.truncated = out_cut or err_cut
        finally:
            self._restore()
            _repair(1)
            _repair(2)

    def _restore(self) -> None:
        """Undo what has been done so far; needs no descriptor."""
        for number, saved in enumerate(self._saved, 1):
            if saved >= 0:
                os.dup2(saved, number)
                os.close(saved)
            elif len(self._saved) == len(_NAMES):
                _close(number)
        for file in self.files:
            _close(file)
        for stream in self._buffered:
            _buffer_lines(stream, False)
        self._buffered = []
        self._saved = []
        self.files = []
        self._streams = ()


def contents(file: int) -> tuple[bytes, bool]:
    """What a memory file has in it, of more than 16 MiB the end; whether it is cut.

    Raises:
        OSError: EBADF, or it cannot be read.
    """
    size = os.fstat(file).st_size
    count = min(size, CAPTURE_MAX)
    # Not at its offset, which is shared with whoever still writes. And no more
    # than there is: a big buffer's huge pages cost milliseconds.
    return os.pread(file, count, size - count), size > count


def _buffer_lines(stream: Any, on: bool) -> None:
    try:
        stream.reconfigure(line_buffering=on)
    except Exception:
        pass  # closed, or an object of the user's own


def _flush_one(stream: Any) -> None:
    try:
        stream.flush()
    except Exception:
        pass  # None, closed, or an object of the function's own


def _memory_file(name: str) -> int:
    fd = os.memfd_create(f"afork: {name}")
    try:
        # As for a log: a program that opens /dev/stderr anew, as shells do,
        # has an offset of its own.
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND | os.O_RDWR)
        if fd <= 2:  # a closed stream's number, which is to be redirected
            low = fd
            fd = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 3)
            os.close(low)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _copy(number: int) -> int:
    """A copy of a standard descriptor, above all of them; -1 if it is closed."""
    try:
        return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3)
    except OSError as exc:
        if exc.errno != errno.EBADF:
            raise
        return -1


def _close(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:
        pass  # the function has closed it
