"""Calls for the items of an iterable, a bounded number at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._worker import PoolCall


async def map_calls(
    call: Callable[[Any], PoolCall],
    iterable: Iterable[Any] | AsyncIterable[Any],
    ordered: bool,
    limit: int,
) -> AsyncIterator[Any]:
    """The results of a call for each item.

    Args:
        call: Makes a call of one item.
        iterable: The items, read when there is room for one more call.
        ordered: Whether in the order of the items, or as they are ready.
        limit: Calls that may be open at a time, their results unread.
    """
    open_calls: deque[PoolCall] = deque()  # in order
    ready: deque[PoolCall] = deque()  # as they finish
    changed = asyncio.Event()
    items = _Items(iterable, changed)

    def finished(done: asyncio.Future[Any]) -> None:
        if not ordered:
            ready.append(done)  # type: ignore[arg-type]
        changed.set()

    try:
        while True:
            changed.clear()
            while len(open_calls) < limit and (item := items.next()):
                new = call(item[0])
                open_calls.append(new)
                new.add_done_callback(finished)
            if not open_calls and items.over:
                return
            if open_calls and (ready if not ordered else open_calls[0].done()):
                first = open_calls[0] if ordered else ready.popleft()
                open_calls.remove(first)
                yield first.result()
            else:
                await changed.wait()
    finally:
        for left in open_calls:
            if not left.cancel() and not left.cancelled():
                left.exception()  # nobody is going to ask for it
        await items.close()


class _Items:
    """The items of an iterable, one read at a time and none ahead."""

    def __init__(
        self, iterable: Iterable[Any] | AsyncIterable[Any], changed: asyncio.Event
    ) -> None:
        self.over = False
        self._iterator: Iterator[Any] | None = None
        self._task: asyncio.Task[None] | None = None
        if isinstance(iterable, AsyncIterable):
            # Results do not wait for a slow source, so it is read by a task.
            self._changed = changed
            self._wanted = asyncio.Event()
            self._item: tuple[Any] | None = None
            self._task = asyncio.create_task(self._read(iterable))
        else:
            self._iterator = iter(iterable)

    def next(self) -> tuple[Any] | None:
        """The next item, if there is one already."""
        if self._iterator is not None:
            for item in self._iterator:
                return (item,)
            self.over = True
            return None
        assert self._task is not None
        item, self._item = self._item, None
        if item is None:
            self._wanted.set()
            if self._task.done():
                self.over = True
                self._task.result()  # raises what the iterable has raised
        return item

    async def _read(self, iterable: AsyncIterable[Any]) -> None:
        try:
            await self._wanted.wait()
            async for item in iterable:
                self._wanted.clear()
                self._item = (item,)
                self._changed.set()
                await self._wanted.wait()
        finally:
            self._changed.set()
            close = getattr(iterable, "aclose", None)
            if close is not None:  # it is a generator
                await close()

    async def close(self) -> None:
        """Read no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            if not self._task.cancelled():
                self._task.exception()  # nobody is going to ask for it
