"""Hearing of one socket on whatever loop."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable


class Watch:
    """Calls back when a socket can be read, and if wanted when it can be written.

    On loops other than asyncio's own, by an epoll instance between the two:
    libuv stops to watch a socket with a pending error. A peer that dies with
    something of ours unread leaves ECONNRESET, and the answers that it has sent
    before would never be read.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fd: int,
        on_readable: Callable[[], None],
        on_writable: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._fd = fd
        self._on_readable = on_readable
        self._on_writable = on_writable
        self._writing = False
        self._epoll: select.epoll | None = None
        if isinstance(loop, asyncio.SelectorEventLoop):
            loop.add_reader(fd, on_readable)
        else:
            self._epoll = select.epoll()
            self._epoll.register(fd, select.EPOLLIN)
            loop.add_reader(self._epoll.fileno(), self._drain)

    def _drain(self) -> None:
        if self._epoll is None or not (found := self._epoll.poll(0)):
            return
        events = found[0][1]
        if events & ~select.EPOLLOUT:
            self._on_readable()
        if events & ~select.EPOLLIN and self._writing:
            self._on_writable()

    def write(self, on: bool) -> None:
        """Whether to call back when it can be written."""
        if on == self._writing:
            return
        self._writing = on
        if self._epoll is not None:
            events = select.EPOLLIN | select.EPOLLOUT if on else select.EPOLLIN
            self._epoll.modify(self._fd, events)
        elif on:
            self._loop.add_writer(self._fd, self._on_writable)
        else:
            self._loop.remove_writer(self._fd)

    def abandon(self) -> None:
        """In a forked child of the application: close, touch no loop."""
        if self._epoll is not None:
            epoll, self._epoll = self._epoll, None
            epoll.close()

    def close(self) -> None:
        """Stop; must come before the descriptor is closed."""
        if self._epoll is not None:
            epoll, self._epoll = self._epoll, None
            self._loop.remove_reader(epoll.fileno())
            epoll.close()
        else:
            self.write(False)
            self._loop.remove_reader(self._fd)
