"""Results that come one by one."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, Any, Self

from afork._errors import ClosedError

from ._codecs import close_all
from ._kinds import WINDOW

if TYPE_CHECKING:
    from types import TracebackType

    from ._call import Call


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
        """Nobody reads on; in any thread."""
        while self.queue:
            close_all(self.queue.popleft()[1])


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
        self._ended = False

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
                if not call.cancelled():
                    call.result()  # raises what the generator has raised
                elif not self._ended:
                    raise ClosedError("the stream was ended before it was read")
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
        self._ended = True
        _end(self._call, self._items)

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
        if finalizing():
            return
        loop = self._call.get_loop()
        if loop.is_closed():
            self._items.clear()
        elif asyncio._get_running_loop() is loop:
            _end(self._call, self._items)
        else:  # the collector may run in any thread
            try:
                loop.call_soon_threadsafe(_end, self._call, self._items)
            except RuntimeError:
                self._items.clear()  # closed since


class Unread:
    """Finds streams that nobody has read from one look to the next.

    Their generators wait for a reader, and so would whoever closes: for ever, if
    it has left its loop but not let go of the stream.
    """

    def __init__(self) -> None:
        #: Those that waited at the last look, and for what to be read.
        self._before: dict[Call, object] = {}

    def look(self, calls: Iterable[Call]) -> list[Call]:
        """The calls of such streams; none the first time."""
        now: dict[Call, object] = {}
        for call in calls:
            items = None if call.done() else call.stream
            # More than a reader leaves there before it gives credit.
            if items is not None and len(items.queue) > WINDOW // 2:
                now[call] = items.queue[0]
        stale = [c for c, item in now.items() if self._before.get(c) is item]
        self._before = now
        return stale


def _end(call: Call, items: Items) -> None:
    """End the call of a stream that nobody reads any more."""
    if not call.done():
        call.cancel()
    elif not call.cancelled():
        call.exception()  # nobody is going to ask for it
    items.clear()
    items.wake()
