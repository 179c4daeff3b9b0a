"""The policy of a pool: who gets which call, and when processes come and go."""

from __future__ import annotations

import asyncio
import errno
import heapq
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from afork._fork import Fork
from afork.rpc._call import Event
from afork.rpc._connection import call_user, copy_error
from afork.rpc._logs import LogRelay
from afork.rpc._output import OutputPipe
from afork.rpc._rpc import Setup
from afork.rpc._stream import Unread

from ._descriptors import count_affordable
from ._rooms import Rooms
from ._template import Template
from ._worker import PoolCall, Worker

logger = logging.getLogger("afork")

#: Seconds in which a process that has nothing to do any more has to end.
_GRACE = 1.0

#: Seconds without a byte taken after which a descriptor that gets the output of
#: processes is not waited for at the end.
_PATIENCE = 1.0

#: Seconds without an attempt after a process could not be started; doubled
#: with each further failure, up to the second number.
_PAUSE, _PAUSE_MAX = 1.0, 32.0

#: What is refused for now: the end of another process may be all it takes.
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)

#: Where output goes: a function called with each line, or a descriptor.
Sink: TypeAlias = "Callable[[str], object] | int"


def usable_cpus() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) or 1


@dataclass(slots=True)
class Counts:
    """What has happened in a pool so far."""

    #: Calls that had a result, and that raised.
    done: int = 0
    failed: int = 0
    #: Calls that were cancelled, and that took too long.
    cancelled: int = 0
    timeouts: int = 0
    #: Calls that were given to another process after a failure.
    retries: int = 0
    #: Processes started, recycled, and lost: ended without having been asked to.
    started: int = 0
    recycled: int = 0
    lost: int = 0


@dataclass(slots=True, kw_only=True)
class Settings:
    """The options of a pool; see `Pool`."""

    idle: int
    max: int
    load: int
    start: float
    stop: float
    max_calls: int | None
    max_age: float | None
    max_rss: int | None
    stdout: Sink | None
    stderr: Sink | str | None
    logging: bool
    on_event: Callable[[Event], object] | None
    on_error: Callable[[BaseException], object] | None
    on_destroy: Callable[[], object] | None


class Core:
    """A pool, without the object that users hold."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        template: Fork | None,
        setup: Setup,
        settings: Settings,
    ) -> None:
        self.loop = loop
        self.setup = setup
        self.settings = settings
        self.asynchronous = setup.asynchronous
        self.on_event = settings.on_event
        self.count = Counts()
        modules = [setup.entry.partition(":")[0]]
        if settings.stdout is not None or settings.stderr is not None:
            modules.append("afork.rpc._redirect")
        if settings.logging:
            modules.append("afork.rpc._logs")
        self.template = Template(template, setup, modules)
        #: Processes that get calls or will, as many as count against max.
        self.workers: set[Worker] = set()
        self.starting = 0
        #: Those that are to end, or have been killed.
        self.leaving: set[Worker] = set()
        #: Those of the workers that can get a call.
        self._rooms = Rooms(settings.load)
        #: The last pipe of either stream. Those before it lead to the same
        #: descriptor, whose bytes are written in order.
        self._outputs: dict[str, OutputPipe] = {}
        #: Calls that no process has: (-priority, id, call).
        self._heap: list[tuple[int, int, PoolCall]] = []
        self.waiting = 0
        #: Calls without an answer.
        self.open = 0
        self.closed = False
        self._over: asyncio.Future[None] | None = None
        self._closing = False
        self._growing = self._dispatching = False
        self._grow_timer: asyncio.TimerHandle | None = None
        self._last_start = -1e9
        #: Until when no further process is tried, and how long the next time.
        self._paused_until = -1e9
        self._pause = _PAUSE
        #: Whether the last that could not start lacked what others give back.
        self._short = False
        #: One has given it back since the last were tried.
        self._given_back = False
        pipes = (settings.stdout, settings.stderr, settings.logging or None)
        #: Descriptors that a process takes here while it starts: its socket, its
        #: pidfd, and both ends of each pipe.
        self._fds_each = 2 + 2 * sum(pipe is not None for pipe in pipes)
        self._timers: set[asyncio.TimerHandle] = set()
        self._stop_timer: asyncio.TimerHandle | None = None
        self._destroyed = False
        if settings.idle:
            self._grow_soon()

    # -- calls

    def submit(self, call: PoolCall) -> None:
        """Take a call."""
        call.core = self
        self.open += 1
        if not self.waiting:
            worker = self._rooms.least()
            if worker is not None:
                self._give(worker, call)
                return
        self._wait(call)
        self._grow_soon()

    def _wait(self, call: PoolCall) -> None:
        call.connection = None
        self.waiting += 1
        heapq.heappush(self._heap, (-call.priority, call.id, call))

    def again(self, call: PoolCall) -> None:
        """A call that is still open has lost its process before it began, or is
        to be tried once more: it waits ahead of those made after it."""
        self._wait(call)
        self._grow_soon()

    def _give(self, worker: Worker, call: PoolCall) -> None:
        load = len(worker.calls)
        worker.given += 1
        self._rooms.taken(worker, load, worker.given == self.settings.max_calls)
        worker.take(call)
        if not load and len(self._rooms.idle) < self.settings.idle:
            self._grow_soon()

    def _dispatch(self) -> None:
        """Give waiting calls to processes that have room."""
        if self._dispatching:
            return  # a call that cannot be sent has made room at once
        self._dispatching = True
        try:
            while self.waiting and (worker := self._rooms.least()) is not None:
                call = heapq.heappop(self._heap)[2]
                if not call.done():
                    self.waiting -= 1
                    self._give(worker, call)
        finally:
            self._dispatching = False

    def cancelled(self, call: PoolCall) -> None:
        """The user has cancelled a call."""
        self.count.cancelled += 1
        if call.stream is not None:
            call.stream.wake()
        if isinstance(call.connection, Worker):
            call.connection.dismiss(call)
            return
        self.waiting -= 1
        call.forget_request()
        if len(self._heap) > 2 * self.waiting + 64:
            self._heap = [item for item in self._heap if not item[2].done()]
            heapq.heapify(self._heap)
        self._close_call()

    def closed_call(self, call: PoolCall) -> None:
        """A call has had its end."""
        if not call.cancelled():
            if call.failed:
                self.count.failed += 1
            else:
                self.count.done += 1
        self._close_call()

    def _close_call(self) -> None:
        self.open -= 1
        if not self.open:
            if self._over is not None and not self._over.done():
                self._over.set_result(None)
            self._end_if_over()

    # -- processes

    def freed(self, worker: Worker) -> None:
        """A process has one call less."""
        if worker not in self.workers:
            if worker.retired and not worker.calls:
                self._later(_GRACE, worker.kill)
            return
        load = len(worker.calls)
        self._rooms.freed(worker, load)
        if self._is_worn(worker):
            self.retire(worker)
            self.count.recycled += 1
            return
        if self.waiting:
            self._dispatch()
        elif not load:
            worker.idle_since = self.loop.time()
            self._watch_idle()

    def _is_worn(self, worker: Worker) -> bool:
        s = self.settings
        return (
            (worker.given == s.max_calls and not worker.calls)
            or (s.max_age is not None and self.loop.time() - worker.began >= s.max_age)
            or (s.max_rss is not None and worker.resident() > s.max_rss)
        )

    def worker_ready(self, worker: Worker) -> None:
        """A process is initialised."""
        if worker in self.workers:
            self.starting -= 1
            self.template.proven = True
            self._pause = _PAUSE
            self._short = False
            self._rooms.add(worker)
            worker.idle_since = self.loop.time()
            self._dispatch()
            self._watch_idle()

    def remove(self, worker: Worker) -> None:
        """A process gets no further calls; another one takes its place."""
        if worker not in self.workers:
            return
        self.workers.discard(worker)
        self.leaving.add(worker)
        if not worker.ready:
            self.starting -= 1
        self._rooms.remove(worker)
        self._grow_soon()

    def retire(self, worker: Worker) -> None:
        """Let a process end after the calls that it has."""
        if worker.retired:
            return
        worker.retired = True
        self.remove(worker)
        worker.finish()
        if not worker.calls:
            self._later(_GRACE, worker.kill)

    def worker_ended(self, worker: Worker, error: BaseException, told: bool) -> None:
        """A process has ended; whether calls were told the error."""
        self.remove(worker)
        self.leaving.discard(worker)
        asked = worker.condemned or (worker.finishing and not told)
        asked = asked or worker.torn_down
        if not asked:
            self.count.lost += 1
            self._call_user(self.settings.on_error, error)
            if not worker.ready:
                self._start_failed(error)
        if worker.ready:
            self._given_back = True
            if self._short:
                self._paused_until = -1e9
        self._grow_soon()
        self._end_if_over()

    # -- growing

    def _grow_soon(self) -> None:
        if not self._growing and not self._destroyed:
            self._growing = True
            self.loop.call_soon(self._grow)

    def _grow(self) -> None:
        """Start as many processes as are wanted, by one request."""
        self._growing = False
        s = self.settings
        self._dispatch()
        wanted = -(-self.waiting // s.load) - len(self._rooms.idle) - self.starting
        if not self.closed:
            wanted += s.idle
        n = wanted = min(wanted, s.max - len(self.workers))
        if n <= 0:
            return
        now = self.loop.time()
        begin = now
        if self._has_others() or not self.waiting:
            begin = self._paused_until
        if s.start:
            n = 1
            if self.workers:
                begin = max(begin, self._last_start + s.start)
        if begin > now:
            self._grow_at(begin)
            return
        self._last_start = now
        self._given_back = False
        try:
            n = self._affordable(n)
            for fork in self.template.get().fork_many(n):
                self._start(fork)
        except Exception as exc:
            # The frames in it would keep the other processes.
            exc.with_traceback(None)
            self._call_user(s.on_error, exc)
            self._start_failed(exc)
            self._grow_soon()
            return
        if n < wanted:
            self._grow_at(now + (s.start or _PAUSE))

    def _affordable(self, n: int) -> int:
        """As many of n processes as there are descriptors for.

        Raises:
            OSError: EMFILE, for none; the first one is always tried.
        """
        affordable = count_affordable(self._fds_each, 2 * self.starting)
        if self._has_others() and not affordable:
            raise OSError(
                errno.EMFILE,
                f"{os.strerror(errno.EMFILE)}: the limit leaves no descriptors for "
                f"more than {len(self.workers)} processes of the pool",
            )
        return min(n, max(1, affordable))

    def _has_others(self) -> bool:
        """Whether there are processes to do what waits, or to make room."""
        return bool(self.workers or (self.leaving and self._short))

    def _grow_at(self, when: float) -> None:
        if self._grow_timer is None:
            self._grow_timer = self.loop.call_at(when, self._grow_timed)

    def _grow_timed(self) -> None:
        self._grow_timer = None
        self._grow()

    def _start(self, fork: Fork) -> None:
        worker = Worker(self.loop, self, fork, self.setup.codec)
        handles: dict[str, int] = {}
        s = self.settings
        run = None
        try:
            if s.stdout is not None:
                worker.stdout = OutputPipe(self.loop, s.stdout)
                handles["stdout"] = worker.stdout.write_fd
                self._outputs["stdout"] = worker.stdout
            if s.stderr is not None:
                sink = 2 if isinstance(s.stderr, str) else s.stderr
                worker.stderr = OutputPipe(self.loop, sink)
                handles["stderr"] = worker.stderr.write_fd
                self._outputs["stderr"] = worker.stderr
            if s.logging:
                worker.logs = LogRelay(self.loop, extra={})
                handles["logs"] = worker.logs.write_fd
            run = self.setup.run(fork, handles)
        finally:
            for relay in (worker.stdout, worker.stderr, worker.logs):
                if relay is not None:
                    relay.close_write()
                    if run is None:  # the loop must not go on reading it
                        relay.close()
        self.workers.add(worker)
        self.starting += 1
        self.count.started += 1
        worker.start(run)

    def _start_failed(self, error: BaseException) -> None:
        """A process could not be started."""
        if self.template.is_lost():
            return
        now = self.loop.time()
        self._short = isinstance(error, OSError) and error.errno in _SHORTAGES
        goes_on = self._has_others() or (self._short and self._given_back)
        if now >= self._paused_until:  # or others have failed with it
            self._paused_until = now + self._pause
            self._pause = min(2 * self._pause, _PAUSE_MAX)
            if goes_on:
                logger.warning("a process of a pool could not start: %s", error)
        if goes_on:
            # They do what waits, make room for another, or fail as well.
            return
        # Nobody else can do what waits.
        if not self.waiting and self.settings.on_error is None:
            logger.error("no process of a pool could start: %s", error)
        heap, self._heap = self._heap, []
        for _, _, call in heap:
            if not call.done():
                self.waiting -= 1
                call.forget_request()
                call.failed = True
                call.set_exception(copy_error(error))
                if call.stream is not None:
                    call.stream.wake()
                self.closed_call(call)

    # -- shrinking

    def _watch_idle(self) -> None:
        if self._stop_timer is None and len(self._rooms.idle) > self.settings.idle:
            self._stop_timer = self.loop.call_later(self.settings.stop, self._shrink)

    def _shrink(self) -> None:
        """Let one process go that has had nothing to do for long enough."""
        self._stop_timer = None
        idle = self._rooms.idle
        if len(idle) > self.settings.idle:
            worker = next(iter(idle))  # the one used least
            if self.loop.time() - worker.idle_since >= self.settings.stop * 0.99:
                self.retire(worker)
        self._watch_idle()

    # -- the end

    def _later(self, seconds: float, callback: Callable[[], Any]) -> None:
        def call() -> None:
            self._timers.discard(timer)
            callback()

        timer = self.loop.call_later(seconds, call)
        self._timers.add(timer)

    async def drain(self) -> None:
        """Wait until no call is open."""
        while self.open:
            if self._over is None or self._over.done():
                self._over = self.loop.create_future()
            await asyncio.shield(self._over)

    def let_go(self) -> None:
        """The user's object has gone: end when all calls have been answered."""
        self.closed = True
        self._end_if_over()

    def _end_if_over(self) -> None:
        if not self.closed or self.open:
            return
        for worker in list(self.workers):
            self.retire(worker)
        if not self.leaving and not self._destroyed:
            self._destroy()

    def kill(self) -> None:
        """End all processes now."""
        for worker in [*self.workers, *self.leaving]:
            worker.condemned = True
            worker.kill()

    async def close(self, timeout: float | None) -> None:
        """Wait for the calls, up to a time; then end all processes."""
        self.closed = True
        if not self._closing:
            self._closing = True
            self._end_unread(Unread())
        try:
            async with asyncio.timeout(timeout):
                await self.drain()
        except TimeoutError:
            self.cancel_all()
        except asyncio.CancelledError:
            self.cancel_all()
            raise
        finally:
            await self._end_workers()

    def _end_unread(self, unread: Unread) -> None:
        """End streams that nobody has read for a while."""
        workers = [*self.workers, *self.leaving]
        for call in unread.look(c for w in workers for c in w.calls.values()):
            call.cancel()  # its reader, should it come back, is told
        self._later(_GRACE, lambda: self._end_unread(unread))

    def cancel_all(self) -> None:
        """Cancel the calls that are open, and kill the processes."""
        for _, _, call in list(self._heap):
            call.cancel()
        for worker in [*self.workers, *self.leaving]:
            for open_call in list(worker.calls.values()):
                open_call.cancel()
        self.kill()

    async def _end_workers(self) -> None:
        for worker in list(self.workers):
            self.retire(worker)
        if self.leaving:
            ended = [worker.ended for worker in self.leaving]
            try:
                await asyncio.wait(ended, timeout=_GRACE)
            finally:  # cancelled: they have had their time
                self.kill()
                self._forgo_starts()
                await asyncio.wait(ended, timeout=_GRACE)
                for worker in list(self.leaving):
                    worker.give_up()  # its template does not say what became of it
                await asyncio.wait(ended)
        if not self._destroyed:
            self._destroy()
        await self.template.end()
        # The loop may end after this, and what is still to be written with it.
        outputs = self._outputs.values()
        await asyncio.gather(*(pipe.wait_closed(_PATIENCE) for pipe in outputs))

    def _forgo_starts(self) -> None:
        """Do not wait for a template that is busy, hung or stopped."""
        late = [worker for worker in self.leaving if worker.fork.pid is None]
        if late:
            self.template.kill()
        for worker in late:
            worker.give_up()

    def _destroy(self) -> None:
        self._destroyed = True
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        for handle in (self._stop_timer, self._grow_timer):
            if handle is not None:
                handle.cancel()
        self.template.close()
        self._call_user(self.settings.on_destroy)

    def _call_user(self, callback: Callable[..., object] | None, *args: object) -> None:
        if callback is not None:
            call_user(self.loop, callback, *args)
