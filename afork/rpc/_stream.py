"""Results that come one by one."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Self

from ._codecs import close_all
from ._kinds import WINDOW

if TYPE_CHECKING:
    from types import TracebackType

    from ._client import Call


class Items:
    """The items of a stream that have arrived, and who waits for one.

    Apart from the `Stream`, to which nothing must refer that lives for as long
    as the call: it ends the call by going away.
    """

    def __init__(self) -> None:
        self.queue: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self.waiter: asyncio.Future[None] | None = None

    def feed(self, payload: bytes, fds: tuple[int, ...]) -> None:
        """An item has arrived."""
        self.queue.append((payload, fds))
        self.wake()

    def wake(self) -> None:
        """There may be something to be seen."""
        waiter, self.waiter = self.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def clear(self) -> None:
        """Nobody reads on."""
        while self.queue:
            close_all(self.queue.popleft()[1])
        self.wake()


class Stream(AsyncIterator[Any]):
    """The items of a generator that runs in a process, as they are made.

    At most 16 items are on their way: the generator waits for a slow reader.
    Leaving the loop early without `aclose` ends the generator once the object
    is gone; ``async with`` ends it at the end of the block.
    """

    def __init__(self, call: Call, decode: Callable[[bytes, Any], Any]) -> None:
        self._call = call
        self._decode = decode
        self._items = call.stream = Items()
        self._taken = 0
        self._closed = False

    @property
    def call_id(self) -> int:
        """Id of the call, as its events have it."""
        return self._call.id

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        call, items = self._call, self._items
        while not items.queue:
            if call.done():
                if not self._closed:
                    call.result()  # raises what the generator has raised
                raise StopAsyncIteration
            if items.waiter is not None:
                raise RuntimeError("the stream is being read by another task")
            items.waiter = call.get_loop().create_future()
            try:
                await items.waiter
            finally:
                items.waiter = None
        payload, fds = items.queue.popleft()
        self._taken += 1
        if self._taken >= WINDOW // 2 and call.connection is not None:
            call.connection.add_credit(call.id, self._taken)
            self._taken = 0
        return self._decode(payload, fds)

    async def aclose(self) -> None:
        """End the generator; items that have not been read are lost."""
        self._end()

    def _end(self) -> None:
        self._closed = True
        if not self._call.done():
            self._call.cancel()
        elif not self._call.cancelled():
            self._call.exception()  # nobody is going to ask for it
        self._items.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not finalizing() and not self._call.get_loop().is_closed():
            self._end()
