"""What can be sent to a process as a descriptor, and how it arrives there."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # see __init__.py
if TYPE_CHECKING:
    from typing import Protocol, TypeAlias

    class HasFileno(Protocol):
        def fileno(self) -> int: ...

    #: Anything with ``fileno()``, or a descriptor number.
    HandleLike: TypeAlias = HasFileno | int

#: Stream arguments of ``Fork.exec``; the first two are those of `subprocess`.
DEVNULL = -3
STDOUT = -2
#: A second socket pair, whose other end the await returns.
SOCKET = -100


class Handle:
    """A descriptor that is neither a socket nor a file: it owns the number.

    A directory, an epoll instance, a pidfd and the like arrive as this.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor; ValueError once it is closed or detached."""
        if self._fd < 0:
            raise ValueError("the handle is closed")
        return self._fd

    def detach(self) -> int:
        """Give the descriptor away; the caller has to close it."""
        fd = self.fileno()
        self._fd = -1
        return fd

    def close(self) -> None:
        """Close it; more than once does no harm."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<afork.Handle fd={self._fd}>"


def descriptor_of(handle: HandleLike) -> int:
    """The number behind a handle, flushed and checked.

    Raises:
        TypeError: no descriptor at all, or a TLS socket.
        ValueError: negative, or closed.
    """
    if isinstance(handle, bool):
        raise TypeError("a handle is needed, not a bool")
    if isinstance(handle, int):
        fd = handle
    else:
        ssl = sys.modules.get("ssl")
        if ssl is not None and isinstance(handle, (ssl.SSLSocket, ssl.SSLObject)):
            raise TypeError(
                "an SSLSocket cannot be sent: its session lives in this process. "
                "Send the plain socket before the handshake, or the listener, "
                "and wrap it in the worker"
            )
        fileno = getattr(handle, "fileno", None)
        if fileno is None:
            raise TypeError(
                "send_fh needs an int or an object with fileno(), "
                f"not {type(handle).__name__}"
            )
        # What is still in a buffer here would be written after what the
        # worker writes, or not at all.
        flush = getattr(handle, "flush", None)
        if callable(flush) and not getattr(handle, "closed", False):
            flush()
        fd = fileno()
        if not isinstance(fd, int):
            raise TypeError(f"fileno() returned {type(fd).__name__}, not int")
    if fd < 0:
        raise ValueError(f"closed handle or negative descriptor: {fd}")
    if fd > 0x7FFFFFFF:
        raise ValueError(f"no descriptor has the number {fd}")
    return fd


def is_stream(fd: int) -> bool:
    """Whether a standard stream is open, and not another file by its number.

    Where one was closed, the next file to be opened gets the number; Python
    makes all but the streams that a program starts with close-on-exec.
    """
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False


def arrived(fd: int) -> object:
    """The object for a received descriptor, which it owns from now on."""
    import stat

    kind = stat.S_IFMT(os.fstat(fd).st_mode)
    if kind == stat.S_IFSOCK:
        from ._worker_socket import of_descriptor

        sock = of_descriptor(fd)
        if not os.get_blocking(fd):
            sock.setblocking(False)
        return sock
    if kind in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFCHR):
        import fcntl

        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if not flags & getattr(os, "O_PATH", 0o10000000):
            import io

            modes = {os.O_RDONLY: "rb", os.O_WRONLY: "wb", os.O_RDWR: "r+b"}
            return io.FileIO(fd, modes[flags & os.O_ACCMODE])
    return Handle(fd)
