"""Counting starts inside one application process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

Sample = dict[str, Any]
Start = Callable[[], Awaitable[None]]


class Unavailable(Exception):
    """This contender cannot run here: its row says why."""


@dataclass(frozen=True)
class Goal:
    """``count`` starts, or as many as fit into ``seconds``; ``inflight`` at a time."""

    seconds: float
    count: int
    inflight: int

    def brief(self) -> Goal:
        """A short run of the same kind, to warm up."""
        return Goal(0.0, max(2, self.inflight), self.inflight)


class Meter:
    """The starts, time and CPU time of this process alone.

    Children that were waited for are not in it.
    """

    def __init__(self, goal: Goal) -> None:
        self._goal = goal
        self.started = 0
        self._cpu = time.process_time()
        self._begin = time.perf_counter()

    def more(self) -> bool:
        """Whether to start one more; counts it."""
        if self._goal.count:
            if self.started >= self._goal.count:
                return False
        elif time.perf_counter() - self._begin >= self._goal.seconds:
            return False
        self.started += 1
        return True

    def stop(self) -> Sample:
        seconds = time.perf_counter() - self._begin
        cpu = time.process_time() - self._cpu
        return {
            "n": self.started,
            "seconds": seconds,
            "cpu_us": cpu * 1e6 / max(self.started, 1),
        }


async def first(start: Start) -> float:
    """The milliseconds of the very first start, which makes the template where there is
    one.
    """
    begin = time.perf_counter()
    await start()
    return (time.perf_counter() - begin) * 1e3


async def measure(start: Start, goal: Goal) -> Sample:
    """Start with ``goal.inflight`` lanes, each one at a time."""

    async def lane(meter: Meter) -> None:
        while meter.more():
            await start()

    async def lanes(goal: Goal) -> Sample:
        meter = Meter(goal)
        if goal.inflight == 1:  # no task switch that the contender did not ask for
            await lane(meter)
        else:
            await asyncio.gather(*(lane(meter) for _ in range(goal.inflight)))
        return meter.stop()

    await lanes(goal.brief())
    return await lanes(goal)
