"""A 1 ms ticker on an event loop, and what it says about the loop's stalls."""

from __future__ import annotations

import asyncio
import math
import time

INTERVAL = 0.001


def percentile(values: list[float], percent: float) -> float:
    """The nearest-rank percentile; 0 for no values."""
    ordered = sorted(values)
    return (
        ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else 0.0
    )


class Ticker:
    """Re-arms a 1 ms timer and keeps by how much each tick came late.

    The late ticks are counted as they happen: a stall of 40 ms is one late tick, not
    forty. ``stalled`` (the late time as a share of all) makes up for that, as long
    stalls weigh there what they last.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._late: list[float] = []
        self._begin = self._last = time.perf_counter()
        self._timer = self._loop.call_later(INTERVAL, self._tick)

    def _tick(self) -> None:
        now = time.perf_counter()
        self._late.append(max(0.0, now - self._last - INTERVAL))
        self._last = now
        self._timer = self._loop.call_later(INTERVAL, self._tick)

    def stop(self) -> dict[str, float]:
        self._timer.cancel()
        now = time.perf_counter()
        # The tick that is due now counts: else a loop blocked from first to last would
        # show no stall at all.
        self._late.append(max(0.0, now - self._last - INTERVAL))
        return {
            "ticks": len(self._late),
            "p50_ms": percentile(self._late, 50) * 1e3,
            "p99_ms": percentile(self._late, 99) * 1e3,
            "max_ms": max(self._late) * 1e3,
            "stalled": sum(self._late) / (now - self._begin),
        }


async def ticker_alone(seconds: float) -> dict[str, float]:
    """The same ticker while nothing is started: the machine's own lateness."""
    ticker = Ticker()
    await asyncio.sleep(seconds)
    return ticker.stop()
