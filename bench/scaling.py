"""Several templates side by side, and templates with at-fork callbacks.

Every function runs in a fresh application process (app.py) and returns that round's
sample.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import subprocess
from collections.abc import Sequence
from typing import Any

import record
from meter import Goal, Sample, measure
from peers import load, run_async

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


def templates(n: int, goal: Goal) -> Sample:
    """Lanes that take turns at ``n`` templates."""
    afork = load("afork")

    async def main() -> Sample:
        made = [await afork.Fork.new_exec().eval(CODE).ready() for _ in range(n)]
        turn = itertools.cycle(made)
        return await measure(lambda: byte_and_end(next(turn)), goal)

    return run_async(main)


def c_loops(n: int, goal: Goal) -> Sample:
    """``n`` C loops of their own, which share what is in flight."""
    command = [str(record.BUILD / "bench" / "limits"), "fork"]
    command += ["--inflight", str(goal.inflight // n), "--mb", "5"]
    command += ["--seconds", str(goal.seconds), "--count", str(goal.count // n)]
    loops = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(n)]
    told = [json.loads(loop.communicate()[0]) for loop in loops]
    return {
        "n": sum(one["n"] for one in told),
        "seconds": max(one["seconds"] for one in told),
    }


def hooks(prepare: str, goal: Goal) -> Sample:
    """Starts from a template that ``prepare`` was run in, and what a worker costs."""
    afork = load("afork")

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


one_template = functools.partial(templates, 1)
two_templates = functools.partial(templates, 2)
one_c_loop = functools.partial(c_loops, 1)
two_c_loops = functools.partial(c_loops, 2)
hooks_0 = functools.partial(hooks, "")
hooks_1 = functools.partial(hooks, _callbacks(1))
hooks_5 = functools.partial(hooks, _callbacks(5))
hooks_threading = functools.partial(hooks, "import threading")
hooks_asyncio = functools.partial(hooks, "import asyncio, logging")
