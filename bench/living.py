"""The memory of workers that live, for memory.py: ours, peers and bare C children.

From smaps_rollup and VmPTE of each. Run as a script it is the peer: ``python living.py
MODULES N`` imports, forks N workers with ``os.fork`` and prints their process ids.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

HEAVY = ("numpy", "pandas")
NUMBERS = (1, 100, 1000)

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


def summed(pids: list[int]) -> dict[str, float]:
    """The median worker."""
    found = [memory_of(pid) for pid in pids]
    private = [one["Private_Dirty"] + one["Private_Clean"] for one in found]
    return {
        "workers": len(pids),
        "pss_mb": median(one["Pss"] for one in found) * 1.024e-3,
        "private_mb": median(private) * 1.024e-3,
        "private_max_mb": max(private) * 1.024e-3,
        "vmpte_kb": median(one["VmPTE"] for one in found),
    }


async def ours(n: int, modules: tuple[str, ...] = ()) -> dict[str, float]:
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
    found["template_pss_mb"] = memory_of(template.pid or 0)["Pss"] * 1.024e-3
    for sock in socks:
        sock.close()
    for f in forks:
        await f.wait()
    template.close()
    await template.wait()
    return found


def theirs(command: list[str]) -> dict[str, float]:
    """Of a program that prints its children's process ids, and ends with its stdin."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pids = []
        while line := process.stdout.readline().strip():
            pids.append(int(line))
        if not pids:
            raise RuntimeError(f"{command[0]}: no worker")
        found = summed(pids)
        found["template_pss_mb"] = memory_of(process.pid)["Pss"] * 1.024e-3
    return found


def measure(limits: Path | None) -> dict[str, dict[str, Any]]:
    """{key: row}, or why there is none; ``limits`` is limits_first."""
    rows: dict[str, dict[str, Any]] = {}

    def peer(modules: str, n: int) -> dict[str, float]:
        flags = ["-I"] if modules else ["-I", "-S"]
        return theirs([sys.executable, *flags, __file__, modules, str(n)])

    for n in NUMBERS:
        if limits is None:
            rows[f"c/{n}"] = {"label": "C fork", "skip": "no C compiler"}
        else:
            command = [str(limits), "hold", "--size", str(n)]
            rows[f"c/{n}"] = {"label": "C fork", **theirs(command)}
        rows[f"os-fork/{n}"] = {"label": "os.fork, python -I -S", **peer("", n)}
        rows[f"afork/{n}"] = {"label": "afork", **asyncio.run(ours(n))}
    missing = [name for name in HEAVY if importlib.util.find_spec(name) is None]
    for n in NUMBERS[:2]:
        for key, label in (("os-fork", "os.fork"), ("afork", "afork")):
            row: dict[str, Any] = {"label": f"{label}, numpy and pandas"}
            if missing:
                row["skip"] = "not installed: " + ", ".join(missing)
            elif key == "afork":
                row.update(asyncio.run(ours(n, HEAVY)))
            else:
                row.update(peer(",".join(HEAVY), n))
            rows[f"{key}-pandas/{n}"] = row
    return rows


def main() -> None:
    """The peer: children of os.fork, of an interpreter with the same modules."""
    modules, n = sys.argv[1].split(",") if sys.argv[1] else [], int(sys.argv[2])
    for name in modules:
        importlib.import_module(name)
    told, tell = os.pipe()
    wait, end = os.pipe()
    for _ in range(n):
        if (pid := os.fork()) == 0:
            os.close(end)
            if modules:
                gc.collect()
            os.write(tell, b"1")
            os.read(wait, 1)
            os._exit(0)
        os.read(told, 1)
        print(pid)
    print(flush=True)
    sys.stdin.read()
    os._exit(0)  # the children's pipe closes with us


if __name__ == "__main__":
    main()
