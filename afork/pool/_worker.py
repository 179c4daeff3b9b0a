"""One process of a pool, and the calls that it has been given."""

from __future__ import annotations

import asyncio
import os
import select
from typing import TYPE_CHECKING, Any

from afork.rpc._call import Call, attach_output
from afork.rpc._codecs import Codec
from afork.rpc._connection import Connection
from afork.rpc._kinds import CANCEL

if TYPE_CHECKING:
    from afork._errors import WorkerLost
    from afork._fork import Fork

    from ._core import Core

#: Times that a socket is read in a row: what it can hold, but not for as long
#: as the process goes on to send.
_READS_MAX = 256

_PAGE = os.sysconf("SC_PAGE_SIZE")


class PoolCall(Call):
    """The answer to a call made through a pool, to be awaited.

    Cancelling it ends the call: one that waits is forgotten, the process of
    one that runs is killed.
    """

    __slots__ = (
        "core",
        "failed",
        "kill_after",
        "limit",
        "overdue",
        "priority",
        "retries",
        "retry_on",
        "timer",
    )

    core: Core
    #: It has raised, or its process was lost.
    failed: bool
    #: Seconds it may run, and seconds more before its process is killed.
    limit: float | None
    kill_after: float
    #: It is to be tried once more because it has taken too long.
    overdue: TimeoutError | None
    priority: int
    retries: int
    retry_on: tuple[type[BaseException], ...]
    timer: asyncio.TimerHandle | None

    def cancel(self, msg: Any = None) -> bool:
        """End the call."""
        if not asyncio.Future.cancel(self, msg):
            return False
        self.core.cancelled(self)
        return True


class Worker(Connection):
    """A process of a pool."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, core: Core, fork: Fork, codec: Codec
    ) -> None:
        super().__init__(loop, fork, codec)
        self.core = core
        self.began = loop.time()
        #: When it had nothing to do any more.
        self.idle_since = self.began
        #: Calls that it has been given.
        self.given = 0
        #: It gets no further calls.
        self.retired = False
        #: It will be killed because of what has become of the call it runs.
        self.condemned = False
        self.on_event = core.on_event

    # -- calls

    def take(self, call: PoolCall) -> None:
        """Be given a call."""
        self.submit(call)
        if call.limit is None or call.id not in self.calls:  # could not be sent
            return
        if self.core.asynchronous or len(self.calls) == 1:
            self._arm(call)

    def sent(self, call: Call) -> None:
        # It is kept: should the process die before it has begun, another one
        # will get it.  What runs at the same time as others may have begun.
        assert isinstance(call, PoolCall)
        if self.core.asynchronous and not call.retries:
            call.forget_request()

    def _arm(self, call: PoolCall) -> None:
        """Its time has begun; a process that does not keep to it is killed."""
        assert call.limit is not None
        if call.timer is None:
            call.timer = self.loop.call_later(
                call.limit + call.kill_after, self._overdue, call
            )

    def _overdue(self, call: PoolCall) -> None:
        timer = call.timer
        self._catch_up(call)
        if call.timer is not timer:
            return  # it has ended; perhaps it has begun anew
        if not call.done():
            self.core.count.timeouts += 1
            error = TimeoutError(f"the call has not ended after {call.limit:g} s")
            if self._is_to_retry(call, error):
                call.overdue = error
            else:
                call.failed = True
                if self.store is not None:
                    self.store.find_output(self.calls)
                if call.output is not None:
                    attach_output(error, call.output)
                call.set_exception(error)
        self._condemn(call)

    def dismiss(self, call: PoolCall) -> None:
        """Nobody waits for this call any more: end it, and no other."""
        if call in self.backlog:  # it is to be sent yet
            del self.calls[call.id]
            self.backlog.remove(call)
            self.answer(call, None, None)
            return
        runs = self.core.asynchronous or self._running() is call
        if runs and not self.core.asynchronous and call.stream is None:
            # Not from in here: it may be a callback for what has been read.
            self.loop.call_soon(self._end_late, call)
        elif self.link is not None:
            # A task ends, a generator is closed, what waits is forgotten.
            self.link.send(CANCEL, call.id, b"")
            self._flush_soon()
            if runs:
                self._expect_end(call)

    def _expect_end(self, call: PoolCall) -> None:
        """It has been told to end, but the code in it may have its own mind."""
        self._stop_timer(call)
        call.timer = self.loop.call_later(call.kill_after, self._end_late, call)

    def _end_late(self, call: PoolCall) -> None:
        """Nobody waits for this call: the process goes, if it is still at it."""
        self._catch_up(call)
        self._condemn(call)

    def _catch_up(self, call: PoolCall) -> None:
        """Read what has been sent: the process may be at another call by now."""
        poll = select.poll()
        if self.link is not None:
            poll.register(self.link.fileno(), select.POLLIN)
        for _ in range(_READS_MAX):
            link = self.link
            if link is None or call.id not in self.calls:
                return
            if not link.pending and not poll.poll(0):
                return
            self._on_readable()

    def _condemn(self, call: PoolCall) -> None:
        """Kill the process for a call that it is still at."""
        if call.id in self.calls and not self.condemned:
            self.condemned = True
            self.kill()
            self.core.remove(self)

    def _running(self) -> Call | None:
        """The call that a synchronous process is at."""
        return next(iter(self.calls.values()), None)

    def answer(self, call: Call, value: Any, error: BaseException | None) -> None:
        assert isinstance(call, PoolCall)
        self._stop_timer(call)
        if call.overdue is not None and error is not None:
            error, call.overdue = call.overdue, None
        elif call.limit and isinstance(error, TimeoutError) and not call.done():
            self.core.count.timeouts += 1
        if error is not None and self._is_to_retry(call, error):
            call.retries -= 1
            call.output = None
            self.core.count.retries += 1
            self.core.again(call)
            self._go_on()
        else:
            call.failed = call.failed or error is not None
            super().answer(call, value, error)

    def _is_to_retry(self, call: PoolCall, error: BaseException) -> bool:
        return call.retries > 0 and not call.done() and isinstance(error, call.retry_on)

    def _stop_timer(self, call: PoolCall) -> None:
        if call.timer is not None:
            call.timer.cancel()
            call.timer = None

    def answered(self, call: Call) -> None:
        assert isinstance(call, PoolCall)
        self._stop_timer(call)
        self.core.closed_call(call)
        self._go_on()

    def _go_on(self) -> None:
        """A call has left; the one behind it begins."""
        following = None if self.core.asynchronous else self._running()
        if following is not None:
            assert isinstance(following, PoolCall)
            if following.done() and following.timer is None:
                # Cancelled when it was to be forgotten; it may have been too late.
                self._expect_end(following)
            elif following.limit is not None and not following.done():
                self._arm(following)
        self.core.freed(self)

    # -- life

    @property
    def load(self) -> int:
        """Calls that it has not answered."""
        return len(self.calls)

    def resident(self) -> int:
        """Bytes of memory that it has resident; 0 once it has gone."""
        try:
            with open(f"/proc/{self.fork.pid}/statm", "rb") as file:
                return int(file.read().split()[1]) * _PAGE
        except (OSError, IndexError):
            return 0

    def give_up(self) -> None:
        """Wait neither for its start nor for its end; either is the end of it."""
        for task in self._tasks:
            task.cancel()
        if not self._tasks:
            self.close_link()
            self.before_end()
            self._tell_ended()

    def on_ready(self) -> None:
        self.core.worker_ready(self)

    def on_retire(self) -> None:
        self.core.retire(self)

    def before_end(self) -> None:
        # Replaced at once: what became of it may take a moment to be known. One
        # that did not even start says why first, or all would start for ever.
        if self.ready:
            self.core.remove(self)
        # Of a synchronous process only the first call can have begun; of an
        # asynchronous one all that it was sent.
        unsent = {call.id for call in self.backlog}
        first = self._running()
        for call in list(self.calls.values()):
            begun = self.core.asynchronous or call is first
            if begun and call.id not in unsent:
                continue
            del self.calls[call.id]
            assert isinstance(call, PoolCall)
            self._stop_timer(call)
            if call.done():
                self.core.closed_call(call)
            else:
                self.core.again(call)
        self.backlog.clear()

    def on_end(self, error: BaseException, told: bool) -> None:
        self.core.worker_ended(self, error, told)

    def lost_error(self) -> WorkerLost:
        error = super().lost_error()
        if self.condemned:
            error.add_note("afork: killed for a call that was cancelled or overdue")
        return error
