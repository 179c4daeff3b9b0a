"""Pool: processes that send what they should not."""

from __future__ import annotations

import asyncio
import os
import random
import signal

import pytest

import afork

from .conftest import bounded
from .scripts.fault_tools import log, subreaper  # noqa: F401 - a fixture
from .scripts.pool_tools import Seen, check

# -- what processes send


RANDOM = random.Random(1).randbytes(100)
GARBAGE = [b"\0" * 16, b"\xff" * 16, b"x" * 1000, RANDOM, b"\1"]


@pytest.mark.parametrize("data", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage(arun, jobs, data):
    async def main():
        told = Seen()
        async with afork.Pool(max=2, load=2, on_error=told) as pool:
            bad = pool.call(jobs.garbage, data)
            others = [pool.call(jobs.add, i) for i in range(10)]
            if data == b"\1":  # not even a head: only its death ends it
                await asyncio.gather(*others[1:])
                check(pool)
                bad.cancel()
                assert await asyncio.gather(*others) == list(range(10))
                return
            with pytest.raises((afork.ProtocolError, afork.WorkerLost)):
                await bad
            assert await asyncio.gather(*others) == list(range(10))
            check(pool)
            assert len(told.all) == 1

    arun(main)


FRAMES = [
    (kind, payload)
    for kind in (1, 5, 17, 18, 19, 20, 21, 22, 23, 99)
    for payload in (b"", b"\x80\x05garbage", RANDOM)
]


@pytest.mark.parametrize(("kind", "payload"), FRAMES, ids=range(len(FRAMES)))
@pytest.mark.parametrize("id", [0, 1 << 60])
def test_frames_that_mean_nothing(jobs, kind, payload, id):
    """Whatever it sends, the call ends and the others are not touched."""

    async def main():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: None)
        async with afork.Pool(max=2) as pool:
            view = pool.with_options(timeout=0.2, kill_after=0.1)
            bad = view.call(jobs.frame, kind, id, payload)
            others = [pool.call(jobs.add, i) for i in range(3)]
            await asyncio.wait([bad, *others])
            check(pool)
            bad.exception()
            # One that was given to it after it had answered is lost with it.
            errors = [x for x in others if x.exception() is not None]
            assert len(errors) <= (id == 0 and kind in (17, 18, 21))
            await pool.drain()
            lost = (afork.WorkerLost, afork.ProtocolError)
            again = pool.with_options(retries=1, retry_on=lost)
            assert await again.call(jobs.add, 1) == 1

    with asyncio.Runner() as runner:
        runner.run(bounded(main))


def test_a_process_that_closes_its_socket(arun, jobs):
    async def main():
        async with afork.Pool(max=1) as pool:
            with pytest.raises(afork.WorkerLost):
                await pool.call(jobs.close_socket)
            assert await pool.call(jobs.add, 1) == 1

    arun(main)


def test_a_socket_that_a_grandchild_holds(arun, jobs):
    """The end of the process is noticed although its socket stays open."""

    async def main():
        seen = Seen()
        async with afork.Pool(max=1, on_event=seen) as pool:
            with pytest.raises(afork.WorkerLost, match="SIGKILL"):
                await pool.call(jobs.fork_and_die)
            (event,) = seen.all
            os.kill(event.args[1], signal.SIGKILL)
            assert await pool.call(jobs.add, 1) == 1

    with subreaper():
        arun(main)
