"""A soak: many starts, then look for what is left behind.

``python bench/soak.py [STARTS]`` ends with status 1 if the application or its
template has other descriptors, children or threads than after the first
thousand starts, or has grown by more than 1 MiB since.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from pathlib import Path

import afork

WARM_UP = 1000
IN_FLIGHT = 16
GROWTH_KB = 1024

Figures = dict[str, int]


def private_kb(pid: int) -> int:
    """What only this process has in memory; shared pages come and go."""
    kb = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:", "Shared_Dirty:")):
            kb += int(line.split()[1])
    return kb


def figures(pid: int) -> Figures:
    """Memory in kB, and the numbers of what a leak would leave."""
    task = Path(f"/proc/{pid}/task")
    children = [
        child for t in task.iterdir() for child in (t / "children").read_text().split()
    ]
    return {
        "memory": private_kb(pid),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "children": len(children),
        "threads": len(list(task.iterdir())),
    }


async def start_one(i: int) -> None:
    """Each way that a process can go, in turn."""
    loop = asyncio.get_running_loop()
    kind = i % 8
    if kind == 0:
        fork = afork.Fork.new()
        await fork.exec("true")
        await fork.wait()
    elif kind == 1:
        async with afork.Fork.new().send_arg("x").send_fh(1) as fork:
            await fork.ready()
    elif kind == 2:
        try:
            await afork.Fork.new().eval("raise ValueError").run("builtins.id")
        except afork.RemoteError:
            pass
    elif kind == 3:
        fork = afork.Fork.new().eval("import os; os.kill(os.getpid(), 9)")
        try:
            await fork.run("builtins.id")
        except afork.WorkerLost:
            pass
    else:
        sock = await afork.Fork.new().run("builtins.id")
        await loop.sock_recv(sock, 1)
        sock.close()


async def starts(n: int) -> None:
    numbers = iter(range(n))

    async def worker() -> None:
        for i in numbers:
            await start_one(i)

    async with asyncio.TaskGroup() as group:
        for _ in range(IN_FLIGHT):
            group.create_task(worker())


async def quiet() -> tuple[Figures, Figures]:
    """Figures of the application and its template with nothing going on.

    The end of file comes before the end of a process: it is asked for again
    until the template has no child, for 10 s at most.
    """
    template = afork.Fork.default()
    async with asyncio.timeout(10):
        await template.ready()
        assert template.pid is not None
        while figures(template.pid)["children"]:
            await template.ready()
        # It may have reaped the last ones behind its answer: what it reported of
        # them, with which their pidfds are closed, comes ahead of the next one.
        await template.ready()
    gc.collect()
    return figures(os.getpid()), figures(template.pid)


async def soak(n: int) -> int:
    await starts(WARM_UP)
    before = await quiet()
    await starts(n)
    after = await quiet()
    failed = False
    for who, old, new in zip(("application", "template"), before, after, strict=True):
        for what in old:
            bad = (
                new[what] - old[what] > GROWTH_KB
                if what == "memory"
                else new[what] != old[what]
            )
            failed |= bad
            print(
                f"{who:12} {what:12} {old[what]:8} -> {new[what]:8}"
                + ("  LEFT BEHIND" if bad else "")
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(asyncio.run(soak(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)))
