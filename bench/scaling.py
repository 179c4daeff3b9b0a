"""Several templates side by side, and templates with at-fork callbacks.

Every function runs in a fresh application process (app.py) and returns that round's
sample.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import resource
import socket
import subprocess
import time
from collections.abc import Sequence
from typing import Any

import record
from meter import Goal, Sample, measure
from peers import load, run_async
from stall import Ticker

#: In a worker, first of all: what it has cost it to get there.
CODE = """
import resource
def cost(sock):
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with open("/proc/self/smaps_rollup") as file:
        rows = [line.split() for line in file]
    dirty = [int(row[1]) for row in rows if row[0] == "Private_Dirty:"]
    sock.send(b"%d,%d" % (faults, dirty[0]))
def sized(sock): sock.send(b"x")
"""


async def byte_and_end(template: Any) -> None:
    """A worker counts when it has sent its byte; the next one waits for its end."""
    loop = asyncio.get_running_loop()
    with await template.fork().run("sized") as sock:
        if await loop.sock_recv(sock, 1) != b"x":
            raise RuntimeError("the worker ended without its byte")
        await loop.sock_recv(sock, 1)


def templates(n: str, goal: Goal) -> Sample:
    """Lanes that take turns at ``n`` templates."""
    afork = load("afork")

    async def main() -> Sample:
        made = [await afork.Fork.new_exec().eval(CODE).ready() for _ in range(int(n))]
        turn = itertools.cycle(made)
        return await measure(lambda: byte_and_end(next(turn)), goal)

    return run_async(main)


def c_loops(n: str, goal: Goal) -> Sample:
    """``n`` C loops of their own, which share what is in flight."""
    share = Goal(goal.seconds, goal.count // int(n), goal.inflight // int(n))
    command = [str(record.BUILD / "bench" / "limits"), "fork"]
    command += ["--inflight", str(share.inflight), "--mb", "5"]
    command += ["--seconds", str(goal.seconds), "--count", str(share.count)]
    loops = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(int(n))]
    told = [json.loads(loop.communicate()[0]) for loop in loops]
    return {
        "n": sum(one["n"] for one in told),
        "seconds": max(one["seconds"] for one in told),
    }


def hooks(which: str, goal: Goal) -> Sample:
    """Starts from a template with those callbacks at fork, and what a worker costs.

    ``which`` are so many that do nothing, or the modules that bring theirs along.
    """
    afork = load("afork")
    prepare = _callbacks(int(which)) if which.isdigit() else f"import {which}"

    async def main() -> Sample:
        template = await afork.Fork.new_exec().eval(prepare).eval(CODE).ready()
        sample = await measure(lambda: byte_and_end(template), goal)
        found: list[Sequence[int]] = []
        for _ in range(9):
            with await template.fork().run("cost") as sock:
                told = await asyncio.get_running_loop().sock_recv(sock, 64)
            found.append([int(one) for one in told.split(b",")])
        faults, dirty = (sorted(column)[4] for column in zip(*found, strict=True))
        us = 1e6 * sample["seconds"] / sample["n"]
        return {**sample, "start_us": us, "faults": faults, "dirty_kb": dirty}

    return run_async(main)


def _callbacks(n: int) -> str:
    return f"""
import os
def callback(): pass
for _ in range({n}):
    os.register_at_fork(before=callback, after_in_parent=callback,
                        after_in_child=callback)
"""


def many(n: str, goal: Goal) -> Sample:
    """One fork_many and its runs, beside as many socket pairs and nothing else."""
    afork = load("afork")
    size = int(n)

    def bare() -> float:
        begin = time.perf_counter()
        pairs = [socket.socketpair() for _ in range(size)]
        seconds = time.perf_counter() - begin
        for pair in pairs:
            for sock in pair:
                sock.close()
        return seconds

    async def burst(template: Any, watch: bool = False) -> Sample:
        ticker = Ticker() if watch else None
        await asyncio.sleep(0.01)
        cpu, begin = time.process_time(), time.perf_counter()
        forks = template.fork_many(size)
        socks = [await run for run in [f.run("sized") for f in forks]]
        seconds = time.perf_counter() - begin
        cpu = time.process_time() - cpu
        for sock in socks:
            sock.close()
        told = {"stall_ms": ticker.stop()["max_ms"]} if ticker else {}
        for f in forks:
            await f.wait()
        return {"n": size, "seconds": seconds, "cpu_us": cpu * 1e6 / size, **told}

    async def main() -> Sample:
        template = await afork.Fork.new_exec().eval(CODE).ready()
        await burst(template)
        gc.collect()
        bare_ms = bare() * 1e3
        sample = await burst(template)
        watched = await burst(template, watch=True)
        return {**sample, "bare_ms": bare_ms, "stall_ms": watched["stall_ms"]}

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return run_async(main)
