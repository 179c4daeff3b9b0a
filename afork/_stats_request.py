"""Asking a process for its stats: the application's part."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from . import _afork
from ._errors import ClosedError
from ._state import next_id
from ._stats import decode

if TYPE_CHECKING:
    from ._process import Process


async def ask_stats(process: Process, channel: _afork.Channel) -> dict[str, Any]:
    """Ask, wait for the answer, and decode it."""
    token = next_id()
    if process.stats is None:
        process.stats = {}
    answers = process.stats
    answers[token] = None
    try:
        channel.frame(_afork.CMD_STATS, token.to_bytes(8, sys.byteorder))
        process.flush()
        await process.until(
            lambda: (
                answers[token] is not None
                # An error may come before the answer; a lost process has none.
                or (process.gone and (process.error is not None or process.released))
            )
        )
        payload = answers[token]
    finally:
        del answers[token]
    if payload is None:
        process.raise_error()
        raise ClosedError("closed while stats were awaited")
    return decode(payload)
