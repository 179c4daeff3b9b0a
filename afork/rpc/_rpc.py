"""Rpc: function calls into one process."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from afork import _afork, _child
from afork._errors import ClosedError
from afork._function import function_name
from afork._interpreter import main_module

from ._call import Call, Event, encode_call
from ._codecs import close_all, codec_name, find_codec
from ._connection import Connection, call_user, copy_error
from ._kinds import CALL, STREAM
from ._stream import Stream, Unread

logger = logging.getLogger("afork")

if TYPE_CHECKING:
    from types import TracebackType

    from afork._fork import Fork

Function: TypeAlias = "str | Callable[..., object]"


class Setup:
    """What a process is told about how to serve, and its relays here."""

    def __init__(
        self,
        func: Function | None,
        *,
        init: Function | None,
        done: Function | None = None,
        initargs: tuple[object, ...] = (),
        asynchronous: bool,
        codec: object,
    ) -> None:
        if _child.loading_main:
            raise RuntimeError(
                "calls are made by code that executes whenever the main program "
                'is loaded in a process: put it under if __name__ == "__main__":'
            )
        self.codec = find_codec(codec_name(codec))
        self.asynchronous = asynchronous
        self.needs_main = False
        values: dict[str, bytes] = {"codec": codec_name(codec).encode()}
        for key, function in (("func", func), ("init", init), ("done", done)):
            if function is not None:
                name, needs_main = function_name(function, False)
                values[key] = name.encode("utf-8", "surrogatepass")
                self.needs_main |= needs_main
        try:
            values["main"] = main_module()
        except TypeError:
            if self.needs_main:
                raise
        if initargs:
            try:
                values["initargs"], fds = self.codec.encode(initargs)
            except Exception as exc:
                from ._advice import advise

                advise(exc, self.codec, initargs)
                raise
            if fds:
                close_all(fds)
                raise ValueError("the arguments of init are too large")
        self.values = values
        # Objects of the main program have another module name over there. What
        # multiprocessing has put there may be the program that runs ours:
        # coverage, or a debugger.
        sys.modules["__mp_main__"] = sys.modules["__main__"]

    @property
    def entry(self) -> str:
        """The function that the process runs."""
        kind = "_async" if self.asynchronous else "_sync"
        return f"afork.rpc.{kind}:enter"

    def run(self, fork: Fork, handles: dict[str, int]) -> Any:
        """Make a process serve; the awaitable of `Fork.run`.

        Args:
            fork: The process.
            handles: Descriptors for "stdout", "stderr" and "logs", in this order.
        """
        values = dict(self.values)
        if fork._process.has_main:
            del values["main"]
        for name, fd in handles.items():
            fork.send_fh(fd)
            values[name] = b"1"
        if "logs" in handles:
            from ._logs import levels

            values["level"] = b"%d" % logging.getLogger().getEffectiveLevel()
            pairs = [(k.encode(), b"%d" % v) for k, v in levels().items()]
            values["levels"] = _afork.pack_strings([x for pair in pairs for x in pair])
        strings = [x for k, v in values.items() for x in (k.encode(), v)]
        return fork.send_arg(_afork.pack_strings(strings)).run(self.entry)


class Rpc:
    """Calls of one function in one process; made by `Fork.rpc`.

    Calling it queues the call and gives a future. Calls of a synchronous
    process are answered in order; those of an asynchronous one as they finish.

    Cancelling a call that the process has not begun forgets it. One that runs
    goes on in a synchronous process, and only its answer is dropped (a pool
    would kill the process); in an asynchronous one, its task is cancelled.

    A process whose object is dropped finishes its calls and ends. Bound to
    the event loop that it is first used in.
    """

    def __init__(
        self,
        fork: Fork,
        setup: Setup,
        *,
        on_event: Callable[[Event], object] | None,
        on_error: Callable[[BaseException], object] | None,
        on_destroy: Callable[[], object] | None,
    ) -> None:
        self._fork = fork
        self._codec = setup.codec
        self._on_event = on_event
        self._on_error = on_error
        self._on_destroy = on_destroy
        self._connection: _RpcConnection | None = None
        self._closed = self._killed = False
        self._run = setup.run(fork, {})

    def _connect(self) -> _RpcConnection:
        """The connection, made when a loop is there to serve it."""
        connection = self._connection
        if connection is not None:
            if asyncio.get_running_loop() is not connection.loop:
                raise RuntimeError(f"{self!r} belongs to another event loop")
        else:
            loop = asyncio.get_running_loop()
            connection = _RpcConnection(loop, self._fork, self._codec)
            connection.on_event = self._on_event
            connection.on_error = self._on_error
            connection.on_destroy = self._on_destroy
            connection.killed = self._killed
            connection.start(self._run)
            self._run = None
            self._connection = connection
        return connection

    def _open(self) -> Connection:
        if self._closed:
            raise ClosedError("call after close")
        connection = self._connect()
        if connection.ended.done():
            assert connection.error is not None
            raise copy_error(connection.error)
        return connection

    def __call__(self, *args: object, **kwargs: object) -> Call:
        """Queue a call of the function; its answer is to be awaited.

        Raises:
            Exception: the arguments cannot be encoded.
            WorkerLost: the process has died.
            ClosedError: after `close`.

        Raises when awaited:
            Exception: what the function has raised, its remote traceback as
                ``__cause__``; or RemoteError, if it cannot cross processes.
            WorkerLost: the process died before it answered.
        """
        connection = self._open()
        call = encode_call(connection.loop, self._codec, CALL, args, kwargs)
        connection.submit(call)
        return call

    def stream(self, *args: object, **kwargs: object) -> Stream:
        """Queue a call of a generator; its items are to be read by ``async for``.

        Raises:
            As a call does.
        """
        connection = self._open()
        call = encode_call(connection.loop, self._codec, STREAM, args, kwargs)
        stream = Stream(call, self._codec.decode)
        connection.submit(call)
        return stream

    @property
    def fork(self) -> Fork:
        """The process."""
        return self._fork

    @property
    def pid(self) -> int | None:
        """Process id, or None until the process has reported its start."""
        return self._fork.pid

    def kill(self) -> None:
        """End the process now: calls without an answer raise `WorkerLost`."""
        self._closed = True
        self._killed = True
        if self._connection is not None:
            self._connection.killed = True
        try:
            self._fork.kill()
        except ProcessLookupError:
            pass

    async def close(self) -> None:
        """Wait for all calls to be answered, and the process to end.

        A stream of which nothing is read for a second, so that its generator
        waits, is ended. Cancelling this kills the process.
        """
        self._closed = True
        connection = self._connect()
        connection.finish()
        unread = Unread()
        try:
            while not connection.ended.done():
                for call in unread.look(connection.calls.values()):
                    call.cancel()
                await asyncio.wait([connection.ended], timeout=1.0)
        except asyncio.CancelledError:
            connection.kill()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if value is not None:
            self.kill()
        await self.close()

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        connection = getattr(self, "_connection", None)
        if connection is None or finalizing() or connection.loop.is_closed():
            return
        try:
            connection.loop.call_soon_threadsafe(connection.finish)
        except RuntimeError:
            pass  # closed in another thread since

    def __repr__(self) -> str:
        return f"<afork.Rpc pid={self.pid}>"


class _RpcConnection(Connection):
    """Tells the callbacks of an `Rpc`."""

    on_error: Callable[[BaseException], object] | None = None
    on_destroy: Callable[[], object] | None = None
    killed = False

    def on_end(self, error: BaseException, told: bool) -> None:
        if isinstance(error, ClosedError) or self.killed:
            pass  # it was asked to
        elif self.on_error is not None:
            call_user(self.loop, self.on_error, error)
        elif not told:
            logger.error("a process that serves calls has ended: %s", error)
        if self.on_destroy is not None:
            call_user(self.loop, self.on_destroy)
