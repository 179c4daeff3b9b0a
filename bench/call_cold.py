"""Pools from nothing: until all workers are at work. Samples as in call_peers.py."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import afork_bench_target as target
from meter import Goal, Sample
from peers import load, run_async, version

PRELOADED = ["numpy", target.__name__]
N = 4


class Meeting:
    """Where `afork_bench_target.meet` goes to."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="afork-bench-")
        self.address = str(Path(self._folder.name, "meeting"))
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.bind(self.address)
        self.sock.listen(64)

    def wait(self, n: int) -> tuple[float, list[int], list[socket.socket]]:
        """When all of n processes are there, their ids, and the word to let them go."""
        there = [self.sock.accept()[0] for _ in range(n)]
        pids = [int.from_bytes(sock.recv(8), "little") for sock in there]
        return time.perf_counter(), pids, there

    def close(self) -> None:
        self.sock.close()
        self._folder.cleanup()


class _Watch:
    """Waits in a thread: the application has something else to do."""

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting
        self.at = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.at, pids, there = self._meeting.wait(N)
        for sock in there:
            sock.close()
        if len(set(pids)) != N:
            raise RuntimeError(f"not {N} processes: {pids}")

    def join(self) -> float:
        self._thread.join(30)
        return self.at


def _pool(name: str, context: Any) -> Any:
    if name == "ppe":
        from concurrent.futures import ProcessPoolExecutor

        return ProcessPoolExecutor(N, mp_context=context)
    if name == "loky":
        return load("loky").ProcessPoolExecutor(N)
    return load("pebble").ProcessPool(N, context=context)


def blocking(name: str, goal: Goal) -> Sample:
    """From nothing, then again with the forkserver up."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    meeting = Meeting()

    def once() -> float:
        watch = _Watch(meeting)
        begin = time.perf_counter()
        pool = _pool(name, context)
        submit = pool.submit if name != "pebble" else schedule(pool)
        open_calls = [submit(target.meet, meeting.address) for _ in range(N)]
        seconds = watch.join() - begin
        for call in open_calls:
            call.result(30)
        if name == "pebble":
            pool.close()
            pool.join()
        else:
            pool.shutdown()
        return seconds

    first = once()
    again = [once() for _ in range(3)]
    meeting.close()
    return {"n": 1, "seconds": first, "warm_ms": [x * 1e3 for x in again]}


def schedule(pool: Any) -> Any:
    return lambda fn, *args: pool.schedule(fn, args=args)


def ours(goal: Goal) -> Sample:
    """From nothing, then again with a template that is up."""
    afork = load("afork")
    meeting = Meeting()

    async def once(pool: Any) -> float:
        watch = _Watch(meeting)
        begin = time.perf_counter()
        async with pool() as made:
            made.template.require(*PRELOADED)
            open_calls = [made.call(target.meet, meeting.address) for _ in range(N)]
            await asyncio.gather(*open_calls)
        return watch.join() - begin

    async def main() -> Sample:
        first = await once(lambda: afork.Pool(max=N))
        template = afork.Fork.new().require(*PRELOADED)
        await template.ready()
        again = [
            await once(lambda: afork.Pool(max=N, template=template)) for _ in range(3)
        ]
        return {"n": 1, "seconds": first, "warm_ms": [x * 1e3 for x in again]}

    sample = run_async(main)
    meeting.close()
    return {**sample, "versions": {"afork": version(afork)}}
