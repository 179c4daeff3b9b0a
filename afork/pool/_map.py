"""Calls for the items of an iterable, a bounded number at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
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
    items = _items(iterable)
    open_calls: deque[PoolCall] = deque()  # in order
    ready: deque[PoolCall] = deque()  # as they finish
    woken = asyncio.Event()
    more = True

    def finished(done: asyncio.Future[Any]) -> None:
        ready.append(done)  # type: ignore[arg-type]
        woken.set()

    async def fill() -> None:
        nonlocal more
        while more and len(open_calls) < limit:
            try:
                item = await anext(items)
            except StopAsyncIteration:
                more = False
                return
            new = call(item)
            open_calls.append(new)
            if not ordered:
                new.add_done_callback(finished)

    try:
        while True:
            await fill()
            if not open_calls:
                return
            if ordered:
                result = await open_calls[0]
                open_calls.popleft()
            else:
                while not ready:
                    woken.clear()
                    await woken.wait()
                first = ready.popleft()
                open_calls.remove(first)
                result = first.result()
            yield result
    finally:
        for left in open_calls:
            if not left.cancel() and not left.cancelled():
                left.exception()  # nobody is going to ask for it
        await items.aclose()


async def _items(iterable: Iterable[Any] | AsyncIterable[Any]) -> Any:
    if isinstance(iterable, AsyncIterable):
        async for item in iterable:
            yield item
    else:
        for item in iterable:
            yield item
