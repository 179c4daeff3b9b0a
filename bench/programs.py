"""Program starts (scenario 2) and what they do to the loop.

Start /bin/true with its stdio on /dev/null, wait for its status.

Three phases in one application process: starts alone (rate, CPU time), the ticker
alone, starts with the ticker. So the ticker's own cost is in no rate, and the stalls
are compared with those of the same process on the same loop.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Awaitable, Callable
from typing import Any

from meter import Goal, Sample, first, measure
from peers import load, one_by_one, run_async, version
from stall import Ticker, ticker_alone

#: bench/scale.py has it run others.
PROGRAM, *ARGS = os.environ.get("AFORK_BENCH_PROGRAM", "/bin/true").split(":")
DEVNULL = subprocess.DEVNULL


def _check(returncode: int | None) -> None:
    if returncode != 0:
        raise RuntimeError(f"{PROGRAM}: status {returncode}")


async def _phases(create: Callable[..., Awaitable[Any]], goal: Goal) -> Sample:
    async def start() -> None:
        process = await create(
            PROGRAM, *ARGS, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL
        )
        _check(await process.wait())

    first_ms = await first(start)
    sample = await measure(start, goal)
    alone = await ticker_alone(max(0.2, sample["seconds"] * 0.75))
    ticker = Ticker()
    await measure(start, goal)
    return {
        **sample,
        "first_ms": first_ms,
        "ticker_alone": alone,
        "ticker": ticker.stop(),
    }


def subprocess_run(goal: Goal) -> Sample:
    """Blocking: there is no loop to stall, it would stand still all the time."""

    def start() -> None:
        _check(
            subprocess.run(
                [PROGRAM, *ARGS],
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=DEVNULL,
                check=False,
            ).returncode
        )

    return one_by_one(start, goal)


def asyncio_exec(goal: Goal) -> Sample:
    return run_async(lambda: _phases(asyncio.create_subprocess_exec, goal))


def uvloop_exec(goal: Goal) -> Sample:
    versions = {"uvloop": version(load("uvloop"))}
    return {
        **run_async(lambda: _phases(asyncio.create_subprocess_exec, goal), "uvloop"),
        "versions": versions,
    }


def afork_exec_program(goal: Goal) -> Sample:
    create = load("afork").create_subprocess_exec
    return run_async(lambda: _phases(create, goal))


def afork_exec_program_uvloop(goal: Goal) -> Sample:
    create = load("afork").create_subprocess_exec
    return run_async(lambda: _phases(create, goal), "uvloop")
