"""The asynchronous back end: an event loop, and a task for each call."""

from __future__ import annotations

import asyncio
import inspect
import struct
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar, copy_context
from threading import get_ident
from typing import TYPE_CHECKING, Any

from . import _serve
from ._codecs import close_all
from ._kinds import (
    CALL,
    CANCEL,
    CREDIT,
    ITEM,
    KEYWORDS,
    OPTIONS,
    RESULT,
    STOP,
    STREAM,
    WINDOW,
)

if TYPE_CHECKING:
    import socket

_CREDIT = struct.Struct("=I")

#: Seconds until descriptors are tried again that the kernel did not take.
_BACK_OFF = 0.01

#: Bytes of unsent answers above which no further call is read.
_UNSENT_MAX = 1 << 20

_current: ContextVar[int] = ContextVar("afork call", default=0)


class _Credit:
    """Items that a stream may send; waiting for more."""

    def __init__(self) -> None:
        self.left = WINDOW
        self.more = asyncio.Event()
        self.ended = False

    def end(self) -> None:
        """No more will come: what waits for it would wait for ever."""
        self.ended = True
        self.more.set()

    def add(self, n: int) -> None:
        self.left += n
        self.more.set()

    async def take(self) -> None:
        while self.left <= 0:
            if self.ended:
                text = "the end of the socket came within a stream"
                raise ConnectionResetError(text)
            self.more.clear()
            await self.more.wait()
        self.left -= 1


class AsyncServer(_serve.Server):
    """Serves calls with an ``async def`` function, many at a time."""

    def __init__(self, sock: socket.socket, *args: Any) -> None:
        super().__init__(sock, *args)
        self.tasks: dict[int, asyncio.Task[None]] = {}
        #: Descriptors of the calls whose tasks have not begun yet, by id.
        self.waiting: dict[int, tuple[int, ...]] = {}
        self.credits: dict[int, _Credit] = {}
        self.loop = asyncio.get_running_loop()
        self.thread = get_ident()
        self.over: asyncio.Future[None] = self.loop.create_future()
        self.reading = self.writing = self.flushing = False

    async def main(self) -> None:
        """Serve until the application has no more calls."""
        try:
            self.find()
            await _finished(self.init())
        except BaseException as exc:
            self.send_error(0, exc, "init")
            self.link.flush(True)
            return
        self.send_ready()
        self.flush_some()
        self.read(True)
        await self.over
        done = self.config.text("done")
        if done:
            await _finished(self.resolve(done)())

    # -- the socket

    def read(self, on: bool) -> None:
        if on and not self.reading:
            self.loop.add_reader(self.link.fileno(), self.readable)
        elif self.reading and not on:
            self.loop.remove_reader(self.link.fileno())
        self.reading = on

    def readable(self) -> None:
        if not self.reading:
            return
        try:
            frames = self.link.receive()
        except OSError:
            self.stop()
            return
        for kind, id, payload, fds in frames:
            if kind & ~KEYWORDS in (CALL, STREAM):
                self.start(kind, id, payload, fds)
            elif kind == CANCEL:
                self.cancel(id)
            elif kind == CREDIT and id in self.credits:
                self.credits[id].add(_CREDIT.unpack(payload)[0])
            elif kind == OPTIONS:
                self.take_options(id, payload)
        if self.link.pending:
            self.loop.call_soon(self.readable)
        elif self.link.eof:
            self.read(False)
            for credit in self.credits.values():
                credit.end()
            self.end_if_idle()

    def cancel(self, id: int) -> None:
        """End a call; one that has not begun never does."""
        task = self.tasks.get(id)
        if task is not None:
            task.cancel()
        if id in self.waiting:  # its task will not run a line
            close_all(self.waiting.pop(id))
            del self.tasks[id]
            self.link.send(STOP, id, b"")
            self.sent()
            task = None
        if task is None:
            self.options.pop(id, None)

    def stop(self) -> None:
        """The application has gone: nobody wants to know any more."""
        self.read(False)
        for task in self.tasks.values():
            task.cancel()
        if not self.over.done():
            self.over.set_result(None)

    def end_if_idle(self) -> None:
        over = self.link.eof and not self.tasks and not self.link.queued
        if over and not self.over.done():
            self.over.set_result(None)

    def sent(self) -> None:
        """Send at the end of this turn, together with what else it brings."""
        if get_ident() != self.thread:
            self.loop.call_soon_threadsafe(self.sent)
        elif not self.flushing:
            self.flushing = True
            self.loop.call_soon(self.flush_some)

    def writable(self) -> None:
        before = self.link.queued
        self.flush_some()
        if self.writing and self.link.queued == before:
            # Too many descriptors of this user in flight: the socket has room,
            # and says so all the time.
            self.writing = False
            self.loop.remove_writer(self.link.fileno())
            self.loop.call_later(_BACK_OFF, self.flush_some)

    def flush_some(self) -> None:
        self.flushing = False
        # A child whose loop goes on has a copy of what its parent will send.
        self.end_if_forked(None)
        try:
            all_sent = self.link.flush()
        except OSError:
            self.stop()
            return
        if all_sent == self.writing:
            self.writing = not all_sent
            if self.writing:
                self.loop.add_writer(self.link.fileno(), self.writable)
            else:
                self.loop.remove_writer(self.link.fileno())
        # Answers that nobody fetches must not pile up: no further calls then.
        if not self.link.eof:
            self.read(self.link.queued < _UNSENT_MAX)
        self.end_if_idle()

    # -- calls

    def start(self, kind: int, id: int, payload: bytes, fds: tuple[int, ...]) -> None:
        work = self.call if kind & ~KEYWORDS == CALL else self.stream
        context = copy_context()
        context.run(_current.set, id)
        self.waiting[id] = fds
        self.tasks[id] = self.loop.create_task(
            self.answer(work, kind, id, payload, fds), context=context
        )

    async def answer(
        self, work: Any, kind: int, id: int, payload: bytes, fds: tuple[int, ...]
    ) -> None:
        self.end_if_forked(None)  # the parent runs it
        del self.waiting[id]
        try:
            await work(kind, id, payload, fds)
            self.end_if_forked(None)
        except BaseException as exc:
            self.end_if_forked(exc)
            self.send_error(id, exc)
        finally:
            self.tasks.pop(id, None)
            self.sent()

    async def invoke(
        self, kind: int, id: int, payload: bytes, fds: tuple[int, ...]
    ) -> Any:
        """The function's result, or (of a stream) its iterator."""
        options = self.options.pop(id, {})
        args, kwargs = self.decode(kind, payload, fds)
        if "context" in options:
            from ._options import set_context

            set_context(self, options["context"], [])  # the task's own
        seconds = float(options["timeout"]) if "timeout" in options else None
        async with asyncio.timeout(seconds):
            return await _finished(self.func(*args, **kwargs))

    async def call(
        self, kind: int, id: int, payload: bytes, fds: tuple[int, ...]
    ) -> None:
        self.send(RESULT, id, await self.invoke(kind, id, payload, fds))

    async def stream(
        self, kind: int, id: int, payload: bytes, fds: tuple[int, ...]
    ) -> None:
        credit = self.credits[id] = _Credit()
        if self.link.eof:
            credit.end()
        try:
            source = await self.invoke(kind, id, payload, fds)
            items = _async_iterator(source)
            try:
                async for item in items:
                    self.end_if_forked(None)
                    await credit.take()
                    self.send(ITEM, id, item)
                    self.sent()
            finally:
                await items.aclose()
                close = getattr(source, "aclose", None)
                if close is not None:
                    await close()
        finally:
            del self.credits[id]
        self.link.send(STOP, id, b"")

    # -- what afork.rpc offers

    def call_id(self) -> int:
        return _current.get()


async def _finished(value: Any) -> Any:
    """The value, awaited if that can be done."""
    return await value if inspect.isawaitable(value) else value


async def _async_iterator(source: Any) -> Any:
    """One kind of generator over both kinds of iterables."""
    if isinstance(source, AsyncIterator) or hasattr(source, "__aiter__"):
        async for item in source:
            yield item
    else:
        items: Iterator[object] = iter(source)
        for item in items:
            yield item
            await asyncio.sleep(0)  # it must not keep the loop for itself


async def enter(sock: socket.socket, *args: Any) -> None:
    """What the process runs."""
    server = AsyncServer(sock, *args)
    _serve.publish(server)
    await server.main()
