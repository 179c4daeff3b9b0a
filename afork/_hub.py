"""One epoll instance for all descriptors of afork in this process.

Templates belong to the process, not to an event loop, so neither do their
sockets: they are registered here, and every loop that uses afork watches the
epoll descriptor itself. Whichever loop is awake first drains it, under a
lock; what it finds wakes futures of any loop.
"""

from __future__ import annotations

import asyncio
import os
import select
import threading
import time
import weakref
from collections.abc import Callable

from . import _afork

IN = select.EPOLLIN
OUT = select.EPOLLOUT
HUP = select.EPOLLHUP

#: Seconds after which to try again at the limit on descriptors in flight: it is
#: the user's, not the socket's, and nobody tells when there is room.
BACK_OFF = 0.01


class Hub(_afork.Poller):
    """The descriptors that afork watches in this process, and who watches it.

    Its `lock` is held while events are handled and by calls that queue several
    frames. What is the user's (a logging handler, a callback) goes to its
    `after`, which calls it as soon as this thread does not hold it.
    """

    def __init__(self) -> None:
        self._loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
        #: The one attached last: a set of weak references is slow to ask.
        self._last: Callable[[], asyncio.AbstractEventLoop | None] = lambda: None
        #: What is due at a time, whichever loop runs by then.
        self._late: dict[object, tuple[float, Callable[[], None]]] = {}

    def attach(self) -> asyncio.AbstractEventLoop:
        """Make the running loop drain this hub; RuntimeError without one."""
        loop = asyncio.get_running_loop()
        if self._last() is not loop:
            if loop not in self._loops:
                # First: garbage may be collected in there, and a Fork in it
                # attach us once more.
                self._loops.add(loop)
                try:
                    loop.add_reader(self.fileno(), self.drain)
                except BaseException:
                    self._loops.discard(loop)
                    raise
                # The loop that was to do these may have been closed.
                for key, (due, _) in list(self._late.items()):
                    loop.call_later(due - time.monotonic(), self._do_late, key)
            self._last = weakref.ref(loop)
        return loop

    def attach_any(self) -> bool:
        """Attach the running loop, if one runs in this thread."""
        try:
            self.attach()
        except RuntimeError:
            return False
        return True

    def wait(self, seconds: float) -> None:
        """Wait for an event without a loop, then drain: for the end of the process."""
        poll = select.poll()
        poll.register(self, select.POLLIN)
        poll.poll(max(seconds, 0) * 1000)
        self.drain()

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call back after a while; at once if no loop runs in this thread."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            callback()
        else:
            key = object()
            self._late[key] = time.monotonic() + seconds, callback
            loop.call_later(seconds, self._do_late, key)

    def _do_late(self, key: object) -> None:
        with self.lock:
            if key in self._late:
                self._late.pop(key)[1]()

    def hurry(self) -> None:
        """Do now what was to be done later."""
        for key in list(self._late):
            self._do_late(key)

    def close(self) -> None:
        """Forget everything; loops of this process stop watching."""
        for loop in list(self._loops):
            if not loop.is_closed() and _same_thread(loop):
                loop.remove_reader(self.fileno())
        super().close()


def _same_thread(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return not loop.is_running()


def wake(future: asyncio.Future[None]) -> None:
    """Complete a future of whatever loop it belongs to."""
    loop = future.get_loop()
    try:
        if asyncio.get_running_loop() is loop:
            if not future.done():
                future.set_result(None)
            return
    except RuntimeError:
        pass
    if not loop.is_closed():
        try:
            loop.call_soon_threadsafe(_complete, future)
        except RuntimeError:
            pass  # closed since: nobody can be waiting


def _complete(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


_hub: Hub | None = None
_making = threading.Lock()


def hub() -> Hub:
    """The hub of this process, made on first use."""
    global _hub
    if _hub is None:
        with _making:
            if _hub is None:
                _watch_forks()
                _hub = Hub()
    return _hub


#: What a forked child of the application has to give up; set by _process.
forget_all: list[Callable[[list[object]], None]] = []

_watching_forks = False


def _watch_forks() -> None:
    global _watching_forks
    if not _watching_forks:
        _watching_forks = True
        os.register_at_fork(after_in_child=_forked)


def _forked() -> None:
    """In a child of the application: every descriptor has one owner, not us."""
    global _hub, _making
    _making = threading.Lock()  # another thread may have held it
    if _hub is not None:
        old, _hub = _hub, None
        owners = old.owners()
        _afork.Poller.close(old)
        for forget in forget_all:
            forget(owners)
