"""Large arguments of calls, copied and shared. Samples as in call_peers.py."""

from __future__ import annotations

from typing import Any

import afork_bench_target as target
from call_peers import BLOCKING, versions
from meter import Goal, Meter, Sample, measure
from peers import load, run_async

MIB = 1 << 20
SIZE = 64  # MiB of what is copied


def _large(kind: str) -> Any:
    if kind == "bytearray":
        return bytearray(b"\1") * (SIZE * MIB)
    return load("numpy").ones(SIZE * MIB // 8)


def copied(kind: str, name: str, goal: Goal) -> Sample:
    """``name`` is one of call_peers.BLOCKING."""
    argument = _large(kind)
    peer, package = BLOCKING[name]
    with peer() as submit:
        for warm in (goal.brief(), goal):
            meter = Meter(warm)
            while meter.more():
                assert submit(target.touch, argument)() == SIZE * MIB // target.PAGE
            sample = meter.stop()
    return {**sample, "versions": versions(package)}


def ours(kind: str, goal: Goal) -> Sample:
    argument = _large(kind)

    async def main() -> Sample:
        async with load("afork").Pool(max=1) as pool:

            async def start() -> None:
                found = await pool.call(target.touch, argument)
                assert found == SIZE * MIB // target.PAGE

            return await measure(start, goal)

    return run_async(main)


def shared(mib: str, goal: Goal) -> Sample:
    """An array that was born in a SharedBuffer; the worker writes into it."""
    afork, numpy = load("afork"), load("numpy")

    async def main() -> Sample:
        array = numpy.frombuffer(afork.SharedBuffer(int(mib) * MIB), dtype=numpy.uint8)
        array[:] = 7
        async with afork.Pool(max=1) as pool:

            async def start() -> None:
                array[0] = 7
                assert await pool.call(target.ends, array) == 7
                assert array[0] == 1

            return await measure(start, goal)

    return run_async(main)
