"""What run and exec return: awaitables that nobody has to await."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ._hub import hub
from ._process import Process

if TYPE_CHECKING:
    import socket
    from types import TracebackType

T = TypeVar("T")


class _Become(Coroutine[Any, Any, T], Generic[T]):
    """A coroutine object whose work has been queued already.

    It can be awaited once, or given to ``asyncio.create_task``. Dropped without
    that, it is silent, and its process is configured and forgotten.
    """

    __slots__ = ("_coroutine", "_process")

    def __init__(self, process: Process) -> None:
        self._process = process
        self._coroutine: Coroutine[Any, Any, T] | None = None

    def _over(self) -> bool:
        raise NotImplementedError

    def _result(self) -> T:
        raise NotImplementedError

    async def _wait(self) -> T:
        # Process.until in place, since this is where every start comes by; and
        # a process that is to become something is never a quiet one.
        process = self._process
        try:
            shared = hub()
            loop = shared.attach()
            while True:
                with shared.lock:
                    if self._over() or process.error is not None:
                        break
                    future = process.new_waiter(loop)
                try:
                    await future
                except BaseException:
                    process.no_waiter(future)
                    raise
        except BaseException:
            # Cancelled, or its loop is being torn down: nobody will ever hold
            # the socket, so nobody could end the process.
            process.kill()
            raise
        if process.error is not None:
            process.raise_error()
        return self._result()

    def _start(self) -> Coroutine[Any, Any, T]:
        if self._coroutine is None:
            self._coroutine = self._wait()
        return self._coroutine

    def __await__(self) -> Generator[Any, None, T]:
        if self._coroutine is not None:
            raise RuntimeError("cannot be awaited twice")
        self._coroutine = self._wait()
        return self._coroutine.__await__()

    def send(self, value: Any) -> Any:
        return self._start().send(value)

    def throw(
        self,
        kind: Any,
        value: BaseException | object = None,
        traceback: TracebackType | None = None,
    ) -> Any:
        if self._coroutine is None:
            self._process.kill()  # a task cancelled before its first step
        if value is None and traceback is None:
            return self._start().throw(kind)
        return self._start().throw(kind, value, traceback)

    def close(self) -> None:
        """Give up: the process is killed if it is being waited for."""
        if self._coroutine is not None:
            self._coroutine.close()

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # One that has come to its end has taken the socket, or killed the
        # process. Any other may never have been stepped.
        ended = getattr(self._coroutine, "cr_frame", self) is None
        if not ended and not finalizing():
            self._process.forget()

    def __repr__(self) -> str:
        name = type(self).__name__.lower()
        return f"<afork {name} pid={self._process.pid}>"


class Run(_Become["socket.socket"]):
    """The awaitable of `Fork.run`: our end of the socket."""

    __slots__ = ()

    def _over(self) -> bool:
        return self._process.running

    def _result(self) -> socket.socket:
        process = self._process
        sock = process.take_held()
        process.part()
        if sock is None:
            raise asyncio.InvalidStateError("the socket was given to the callback")
        return sock


class Exec(_Become["socket.socket | None"]):
    """The awaitable of `Fork.exec`: our end of its stream socket, or None."""

    __slots__ = ()

    def _over(self) -> bool:
        return self._process.executed

    def _result(self) -> socket.socket | None:
        return self._process.take_held()
