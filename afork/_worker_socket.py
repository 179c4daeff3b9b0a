"""The socket of a worker that has not loaded the module `socket`.

Importing it takes as long as starting an interpreter, mostly to make its
enumerations, and would make each template a third larger. Most workers only
send and receive. So they get an object that can do that by itself, and turns
into a plain ``socket.socket`` as soon as more of it is asked for.
"""

from __future__ import annotations

import _socket
import sys

from . import _afork

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

close = _socket.socket.close


class socket(_socket.socket):
    """What `socket.socket` is, as far as no import is needed for it.

    Name and slots are those of that class: the type is going to be changed.
    """

    __slots__ = ("__weakref__", "_closed", "_io_refs")
    __module__ = "socket"  # in messages

    _closed: bool
    _io_refs: int

    def __enter__(self) -> socket:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._closed:
            self.close()

    def close(self) -> None:
        self._closed = True
        if self._io_refs <= 0:
            close(self)

    def detach(self) -> int:
        self._closed = True
        return _socket.socket.detach(self)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # isinstance asks, and wants another answer than type() gave it before.
        from socket import socket

        return socket

    @property
    def family(self) -> Any:
        return real(self).family

    @property
    def type(self) -> Any:
        return real(self).type

    def __getattr__(self, name: str) -> Any:
        return getattr(real(self), name)

    def __dir__(self) -> Any:
        return dir(real(self))

    def __repr__(self) -> str:
        return repr(real(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return real(self).__reduce_ex__(protocol)


def real(sock: _socket.socket) -> Any:
    """The same object, a `socket.socket` from now on."""
    if type(sock) is socket:
        from socket import socket as whole

        _afork.change_type(sock, whole)
    return sock


def adapt(sock: _socket.socket) -> None:
    """Make it what the rest of the process takes it for."""
    if type(sock) is socket and "socket" in sys.modules:
        real(sock)


def blank() -> socket:
    """One to be filled in by run: all but its descriptor."""
    sock = socket.__new__(socket)
    sock._io_refs = 0
    sock._closed = False
    return sock


def of_descriptor(fd: int) -> Any:
    """The socket of a descriptor, which it owns from now on."""
    sock = blank()
    _socket.socket.__init__(sock, -1, -1, -1, fd)
    adapt(sock)
    return sock
