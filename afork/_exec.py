"""The request that turns a process into a program or starts one."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, TypeAlias

from . import _afork
from ._handles import DEVNULL, SOCKET, STDOUT, descriptor_of

if TYPE_CHECKING:
    import socket

    from ._handles import HandleLike

#: None, DEVNULL, STDOUT (stderr only), SOCKET, or a handle.
Stream: TypeAlias = "HandleLike | None"
PathLike: TypeAlias = "str | bytes | os.PathLike[str]"

#: More than any process can have, less than overflows an int.
FD_MAX = 1 << 30

# struct afork_exec_head and struct afork_exec_fd of src/core/execreq.h
_HEAD = struct.Struct("=7i")
_FD = struct.Struct("=2i")
_NULL = -(2**31)  # AFORK_EXEC_NULL


class Request:
    """One program to be executed, with its descriptors while it is queued."""

    def __init__(
        self,
        program: PathLike,
        args: tuple[PathLike, ...],
        *,
        env: Mapping[str, str] | list[bytes] | None = None,
        cwd: PathLike | None = None,
        argv0: PathLike | None = None,
        umask: int = -1,
        group: int = -1,
        session: bool = False,
    ) -> None:
        self.program = _text(program, "program")
        first = self.program if argv0 is None else _text(argv0, "program")
        self.argv = [first, *(_text(arg, "argument") for arg in args)]
        #: NAME=VALUE, or None for the environment of the process.
        self.env = env if env is None or isinstance(env, list) else [*_strings(env)]
        path = _path_of(self.env or [])
        self.search = os.fsencode(os.defpath) if path is None else path
        self.cwd = b"" if cwd is None else _text(cwd, "cwd")
        self.umask = umask
        self.group = group
        self.session = session
        self._handles: list[int] = []  # borrowed, in the order they are sent
        self._fds: list[tuple[int, int]] = []  # (from, to) of the wire
        self._cwd_handle = -1
        self._socket: socket.socket | None = None

    def add_handle(self, fd: int) -> int:
        """Send a descriptor along; its index."""
        self._handles.append(fd)
        return len(self._handles) - 1

    def map_handle(self, fd: int, to: int) -> None:
        self._fds.append((self.add_handle(fd), to))

    def same(self, source: int, to: int) -> None:
        """Give the program one of its descriptors a second time."""
        here = [index for index, target in self._fds if target == source]
        # -1 - n: the process's own descriptor n, execreq.h
        self._fds.append((here[0] if here else -1 - source, to))

    def map_null(self, to: int) -> None:
        """Give the program /dev/null, opened where it is started."""
        self._fds.append((_NULL, to))

    def use_cwd(self, fd: int) -> None:
        """Work in the directory that fd is open on."""
        self._cwd_handle = self.add_handle(fd)

    @contextlib.contextmanager
    def streams(
        self,
        stdin: Stream,
        stdout: Stream,
        stderr: Stream,
        fds: Mapping[int, HandleLike],
    ) -> Iterator[None]:
        """Open what the streams need until the request has been queued."""
        import socket

        with contextlib.ExitStack() as stack:
            far: int | None = None
            targets: dict[int, Stream] = {0: stdin, 1: stdout, 2: stderr}
            for number, handle in fds.items():
                if not isinstance(number, int):
                    raise TypeError(f"{number!r} is not the number of a descriptor")
                if number in targets and targets[number] is not None:
                    raise ValueError(f"descriptor {number} is given twice")
                if not 0 <= number < FD_MAX:
                    raise ValueError(f"descriptor {number} is out of range")
                targets[number] = handle
            for to, stream in targets.items():
                if stream is None:
                    continue
                if isinstance(stream, int) and stream == SOCKET:
                    if far is None:
                        ours, theirs = socket.socketpair()
                        stack.callback(theirs.close)
                        ours.setblocking(False)
                        self._socket = ours
                        stack.callback(self._close_unless_taken)
                        far = self.add_handle(theirs.fileno())
                    self._fds.append((far, to))
                elif isinstance(stream, int) and stream == DEVNULL:
                    self.map_null(to)
                elif isinstance(stream, int) and stream == STDOUT:
                    if to != 2:
                        raise ValueError("STDOUT is for stderr only")
                    self.same(1, to)
                else:
                    fd = descriptor_of(stream)
                    os.fstat(fd)
                    self.map_handle(fd, to)
            yield

    def _close_unless_taken(self) -> None:
        if self._socket is not None and not self._queued:
            self._socket.close()
            self._socket = None

    _queued = False

    def take_socket(self) -> int:
        """Our end of the stream socket, or -1."""
        sock, self._socket = self._socket, None
        return -1 if sock is None else sock.detach()

    def queue(self, channel: _afork.Channel, letter: int, prefix: bytes = b"") -> None:
        """Queue the descriptors and the request behind them, under the hub's lock."""
        head = _HEAD.pack(
            len(self._handles),
            self._cwd_handle,
            self.umask,
            self.group,
            int(self.session),
            len(self.argv),
            -1 if self.env is None else len(self.env),
        )
        fds = b"".join(_FD.pack(*pair) for pair in self._fds)
        strings = [head, fds, self.program, self.search, self.cwd, *self.argv]
        payload = prefix + _afork.pack_strings([*strings, *(self.env or [])])
        if len(payload) > _afork.FRAME_MAX:
            raise ValueError(f"frame over the cap of {_afork.FRAME_MAX} bytes")
        if len(self._handles) > _afork.HANDLES_MAX:
            raise ValueError(f"more than {_afork.HANDLES_MAX} descriptors at once")
        channel.handles(self._handles)
        channel.frame(letter, payload)
        self._queued = True


def _text(value: PathLike, what: str) -> bytes:
    text = os.fsencode(value)  # TypeError for what is no path
    if b"\0" in text:
        raise ValueError(f"embedded null byte in {what}: {value!r}")
    return text


def _strings(env: Mapping[str, str]) -> Iterator[bytes]:
    for name, value in env.items():
        key, text = os.fsencode(name), os.fsencode(value)
        if not key or b"=" in key or b"\0" in key + text:
            raise ValueError(f"illegal environment variable: {name!r}")
        yield key + b"=" + text


def _path_of(env: list[bytes]) -> bytes | None:
    for item in env:
        if item.startswith(b"PATH="):
            return item[5:]
    return None
