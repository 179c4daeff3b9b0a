"""The memory of workers that live, for memory.py: ours, peers and bare C children.

From smaps_rollup and VmPTE of each, in alternating rounds.
"""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import rounds

Row = dict[str, Any]

HEAVY = ("numpy", "pandas")
NUMBERS = (1, 100, 1000)
FEW = NUMBERS[:2]  # of what takes long to start, or has much in it

PEERS = {
    "forkserver": "multiprocessing forkserver",
    "billiard": "billiard forkserver",
    "pebble": "pebble, forkserver",
    "loky": "loky",
}

WORKER = """
def idle(sock):
    sock.send(b"1")
    sock.recv(1)

def collected(sock):
    import gc
    gc.collect()
    idle(sock)
"""


def memory_of(pid: int) -> dict[str, int]:
    """kB of what smaps_rollup has, and ``VmPTE``. Raises OSError, the process gone."""
    found = {}
    for name in ("smaps_rollup", "status"):
        for line in Path(f"/proc/{pid}/{name}").read_text().splitlines():
            row = line.split()
            if len(row) == 3 and row[2] == "kB":
                found[row[0][:-1]] = int(row[1])
    return found


def parent_of(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


def summed(pids: list[int]) -> Row:
    """The median worker, and the process that they were forked by."""
    found = [memory_of(pid) for pid in pids]
    private = [one["Private_Dirty"] + one["Private_Clean"] for one in found]
    return {
        "workers": len(pids),
        "pss_mb": median(one["Pss"] for one in found) * 1.024e-3,
        "private_mb": median(private) * 1.024e-3,
        "private_max_mb": max(private) * 1.024e-3,
        "vmpte_kb": median(one["VmPTE"] for one in found),
        "template_pss_mb": memory_of(parent_of(pids[0]))["Pss"] * 1.024e-3,
    }


async def ours(n: int, modules: tuple[str, ...] = ()) -> Row:
    """Workers of a template; with modules in it, each collects its garbage first."""
    import afork

    template = afork.Fork.new_exec()
    for name in modules:
        template.require(name)
    template.eval(WORKER)
    await template.ready()
    forks = template.fork_many(n)
    runs = [f.run("collected" if modules else "idle") for f in forks]
    socks = [await run for run in runs]
    for sock in socks:
        await asyncio.get_running_loop().sock_recv(sock, 1)
    found = summed([f.pid for f in forks if f.pid is not None])
    for sock in socks:
        sock.close()
    for f in forks:
        await f.wait()
    template.close()
    await template.wait()
    return found


def theirs(command: list[str]) -> Row:
    """Of a program that prints its workers' process ids, and ends with its stdin."""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=rounds.HERE,
        env=rounds.environment(),
    ) as process:
        assert process.stdout is not None
        pids = []
        while line := process.stdout.readline().strip():
            pids.append(int(line))
        if pids:
            return summed(pids)
    # What it had to say is on our standard error.
    raise RuntimeError(f"{command}: no worker, status {process.returncode}")


def peer(way: str, n: int, modules: tuple[str, ...] = ()) -> Row:
    # A main file would be run again in each worker of a forkserver.
    code = "import living_peers; living_peers.main()"
    return theirs([sys.executable, "-c", code, way, ",".join(modules), str(n)])


def ways(limits: Path | None) -> dict[str, tuple[str, Callable[[], Row] | str]]:
    """By key: label, and what measures it or why nothing does."""
    missing = [name for name in HEAVY if importlib.util.find_spec(name) is None]
    absent = "not installed: " + ", ".join(missing) if missing else ""
    found: dict[str, tuple[str, Callable[[], Row] | str]] = {}
    for n in NUMBERS:
        hold = [str(limits), "hold", "--size", str(n)]
        found[f"c/{n}"] = (
            "C fork",
            (lambda hold=hold: theirs(hold)) if limits else "no C compiler",
        )
        found[f"os-fork/{n}"] = "os.fork", lambda n=n: peer("os-fork", n)
        found[f"afork/{n}"] = "afork", lambda n=n: asyncio.run(ours(n))
    for n in FEW:
        for key, label in PEERS.items():
            there = importlib.util.find_spec(label.split()[0].strip(","))
            found[f"{key}/{n}"] = (
                label,
                (lambda key=key, n=n: peer(key, n)) if there else "not installed",
            )
        found[f"os-fork-pandas/{n}"] = (
            "os.fork, numpy and pandas",
            absent or (lambda n=n: peer("os-fork", n, HEAVY)),
        )
        found[f"afork-pandas/{n}"] = (
            "afork, numpy and pandas",
            absent or (lambda n=n: asyncio.run(ours(n, HEAVY))),
        )
    return found


def measure(limits: Path | None, number: int) -> dict[str, Row]:
    """{key: row} of medians, or why there are none; ``limits`` is limits_first.

    ``of_limit`` is the PSS by that of as many children in C in the same round; ``all``
    has each round's row.
    """
    found = ways(limits)
    every: dict[str, list[Row]] = {key: [] for key in found}
    for _ in range(number):
        for key, (_, way) in found.items():
            if not isinstance(way, str):
                every[key].append(way())
    rows: dict[str, Row] = {}
    for key, (label, way) in found.items():
        rows[key] = {"label": label, "all": every[key]}
        if isinstance(way, str):
            rows[key]["skip"] = way
            continue
        for name in every[key][0]:
            rows[key][name] = median(row[name] for row in every[key])
        bare = every[f"c/{key.rpartition('/')[2]}"]
        if bare:
            pairs = zip(every[key], bare, strict=True)
            rows[key]["of_limit"] = median(a["pss_mb"] / b["pss_mb"] for a, b in pairs)
    return rows
