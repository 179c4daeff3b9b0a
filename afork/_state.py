"""What is known of a process, and who waits to hear of it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from ._hub import BACK_OFF, IN, OUT, hub, wake

if TYPE_CHECKING:
    import asyncio
    import socket

    from . import _afork
    from ._process import Process

_ids = itertools.count(1)


def next_id() -> int:
    """A number for a process or a request, unique in this application."""
    return next(_ids)


class State:
    """The state of a process, and the futures that wait for it to change."""

    # Defaults are the class's: most processes never leave most of them.

    channel: _afork.Channel | None
    id = 0
    plain = False
    parent: Process | None = None
    #: Signals to be sent once it has started.
    signals: Sequence[int] = ()
    #: Descriptors among the pending arguments.
    handles = 0
    #: It was forked from the main program.
    has_main = False
    #: The sys.path that it has been told.
    path: Sequence[str] = ()
    pid: int | None = None
    pidfd = -1  # owned
    #: Whether it is our child, and ours to reap.
    direct = False
    #: The function is entered.
    running = False
    #: It is a program by now.
    executed = False
    #: Our end of the user's socket, owned until it is awaited. A socket object
    #: in a cycle of garbage may be finalised before us, and warn.
    held = -1
    error: BaseException | None = None
    was_logged = False
    #: Highest token of a ready request that was answered.
    done = 0
    #: The same of those that wait for spares.
    warm = 0
    #: Nothing can be written any more; what explains it may be readable.
    broken = False
    #: Its socket has come to an end.
    gone = False
    #: Its end is known, or will not be known any more (status None).
    exited = False
    status: int | None = None
    usage: tuple[int, ...] | None = None
    #: It has made processes of its own.
    forked = False
    #: "run", "exec" or "to_fh" once it was asked to become something.
    claimed = ""
    #: Nobody will await what it was asked to become.
    forgotten = False
    #: No Fork object refers to it any more.
    dropped = False
    #: Its end has been asked for.
    released = False
    #: What to call with our end of the socket.
    callback: Callable[[socket.socket], object] | None = None
    #: Names for the message of a failed start, by its stage.
    names: tuple[str, ...] = ()
    #: Its socket is still to come from its template.
    coming = False
    #: There is no such process, and nothing had been asked of it.
    unused = False
    #: The id of the first of those that were asked for together.
    batch = 0
    #: Answers to stats requests that nobody has taken yet, by token.
    stats: dict[int, bytes | None] | None = None
    #: It was moved to another template once.
    moved = False
    #: Its reports are read when somebody asks, not as they come.
    quiet = False
    #: Children made since they were read last.
    unread = 0
    #: Reports that were read and are not handled yet.
    reports: deque[tuple[int, bytes, _afork.Descriptor | int | None]] | None = None
    _listeners = 0
    _expecting = False
    _losing = False
    _watching_exit = False
    _retrying = False
    #: Whether signals wait for a descriptor to reach it by.
    _signals_late = False
    _waiters: list[asyncio.Future[None]] | None = None
    _exit_callbacks: Sequence[Callable[[], None]] = ()

    def __init__(
        self,
        channel: _afork.Channel | None,
        id: int = 0,
        parent: Process | None = None,
        plain: bool = False,
    ) -> None:
        self.channel = channel
        #: Processes whose exit this one will report, by id.
        self.children: dict[int, Process] = {}
        if plain:
            self.plain = True
        if parent is None:
            return
        self.id = id
        self.parent = parent
        self.path = parent.path
        if parent.handles:
            self.handles = parent.handles
        if parent.has_main:
            self.has_main = True

    # -- waiting

    async def until(self, happened: Callable[[], bool]) -> None:
        """Wait until a report has made the predicate true."""
        loop = hub().attach()
        # Another thread's loop may read the report between any two steps.
        lock = hub().lock
        with lock:
            if happened():
                return
            self._listen(1)
        try:
            while True:
                with lock:
                    if happened():
                        return
                    future = self.new_waiter(loop)
                try:
                    await future
                except BaseException:
                    self.no_waiter(future)
                    raise
        finally:
            with lock:
                self._listen(-1)

    def new_waiter(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        """A future that the next change completes; to be called under the lock."""
        future = loop.create_future()
        if self._waiters is None:
            self._waiters = [future]
        else:
            self._waiters.append(future)
        return future

    def no_waiter(self, future: asyncio.Future[None]) -> None:
        with hub().lock:
            if self._waiters is not None and future in self._waiters:
                self._waiters.remove(future)

    def _wake(self) -> None:
        if self._waiters:
            waiters, self._waiters = self._waiters, None
            for future in waiters:
                wake(future)

    # -- listening

    def be_quiet(self) -> None:
        """Do not wake a loop for every child that exits.

        For templates: most of their children are of no interest to anybody once
        they run. Their end is noticed at once all the same.
        """
        self.quiet = True
        self._set_events()

    def _listen(self, more: int) -> None:
        before = self._listeners
        self._listeners += more
        if self.quiet and bool(before) != bool(self._listeners):
            self._set_events()

    def _set_events(self) -> None:
        channel = self.channel
        if channel is not None:
            events = 0 if self.quiet and not self._listeners else IN
            if channel.queued and not self.broken:
                if not channel.crowded:
                    events |= OUT
                elif not self._retrying:
                    self._retrying = True
                    hub().later(BACK_OFF, self._retry)
            hub().change(channel.fileno(), events)

    def _retry(self) -> None:
        self._retrying = False
        cast("Process", self).flush()

    def adopt(self, child: Process) -> None:
        """Be the one who reports the child's end from now on."""
        child.parent = cast("Process", self)
        self.children[child.id] = child
        self.forked = True
        self._listen(child._expecting + child.coming)
