#!/usr/bin/env python3
"""The second benchmark: what a large template costs, and what workers share of it.

1. starts per second from templates of 0, 150 MB and 1 GB of Python objects, with and
   without huge pages, beside ``os.fork`` of a process with the same objects;
2. 134 MB of dicts read by each of 20 workers that live side by side, frozen or not:
   private memory beyond what a worker allocates itself, and the time of the scan
   against the same scan in the template;
3. the memory of one idle worker of a lean template among 100.

The ways alternate; printed are medians. See ``--help``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import afork
from afork._memory import VARIABLE

#: About 1 MB of Python objects for each 1900 of these.
BUILD = """
data = [
    {"id": i, "name": f"name {i}", "pair": (i * 1.5, str(i))}
    for i in range(int(args[0]))
]
"""
PER_MB = 2300

WORKER = """
import json, time

def memory():
    with open("/proc/self/smaps_rollup") as file:
        rows = (line.split() for line in file)
        return {row[0][:-1]: int(row[1]) for row in rows if len(row) == 3}

def scan():
    n = 0
    for item in data:
        for key in item:
            n += len(key)
        n += item["id"] + len(item["name"]) + len(item["pair"][1])
    return n

def timed():
    begin = time.perf_counter()
    scan()
    return time.perf_counter() - begin

def reader(sock):
    before = memory()["Private_Dirty"]
    first = timed()
    after = memory()["Private_Dirty"]
    sock.sendall(json.dumps([after - before, first, timed()]).encode())
    sock.recv(1)

def idle(sock):
    sock.sendall(b"1")
    sock.recv(1)

def stats(sock):
    from afork._memory import stats
    sock.sendall(json.dumps(stats()).encode())
"""
#: In the template: so that the first worker finds the code specialised.
IN_TEMPLATE = (
    "for _ in range(3): timed()\nseconds = sorted(timed() for _ in range(5))[2]"
)
TELL = "def tell(sock): sock.sendall(json.dumps(seconds).encode())"


@contextlib.contextmanager
def switched_off(names: str) -> Iterator[None]:
    os.environ[VARIABLE] = names
    try:
        yield
    finally:
        del os.environ[VARIABLE]


def make(mb: int, off: str = "", freeze: bool = False) -> afork.Fork:
    """A template with so many MB of objects."""
    with switched_off(off):
        template = afork.Fork.new_exec()
    template.eval(BUILD, str(mb * PER_MB)).eval(WORKER)
    return template.freeze() if freeze else template


async def answer(sock: socket.socket) -> Any:
    data = await asyncio.get_running_loop().sock_recv(sock, 65536)
    return json.loads(data)


async def call(template: afork.Fork, name: str) -> Any:
    with await template.fork().run(name) as sock:
        return await answer(sock)


async def starts(template: afork.Fork, seconds: float) -> float:
    """Starts per second, one at a time: until the end of file of a worker."""
    loop = asyncio.get_running_loop()
    n, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds:
        with await template.fork().run("builtins.id") as sock:
            await loop.sock_recv(sock, 1)
        n += 1
    return n / spent


def os_fork(mb: int, seconds: float) -> float:
    """The same with os.fork in a process with the same objects."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        exec(BUILD, {"args": [str(mb * PER_MB)]}, names := {})
        n, begin = 0, time.perf_counter()
        while (spent := time.perf_counter() - begin) < seconds:
            one, other = socket.socketpair()
            if (child := os.fork()) == 0:
                os._exit(0)
            other.close()
            one.recv(1)
            one.close()
            os.waitpid(child, 0)
            n += 1
        os.write(write, b"%f" % (n / spent))
        del names
        os._exit(0)
    os.close(write)
    with open(read) as file:
        rate = float(file.read())
    os.waitpid(pid, 0)
    return rate


WAYS = {"afork": "", "without huge pages": "arena,collapse"}


async def rates(sizes: list[int], rounds: int, seconds: float) -> list[dict[str, Any]]:
    templates = {}
    first, info = {}, {}
    for mb in sizes:
        for way, off in WAYS.items():
            template = templates[way, mb] = await make(mb, off).ready()
            begin = time.perf_counter()
            await call(template, "stats")
            first[way, mb] = time.perf_counter() - begin
            info[way, mb] = await call(template, "stats")
    found: dict[Any, list[float]] = {}
    for _ in range(rounds):
        for key, template in templates.items():
            found.setdefault(key, []).append(await starts(template, seconds))
    rows = []
    for (way, mb), values in found.items():
        empty = found[way, sizes[0]]
        slower = [a / b for a, b in zip(empty, values, strict=True)]
        rows.append(
            {
                "way": way,
                "mb": info[way, mb]["private_bytes"] / 1e6,
                "per_second": median(values),
                "all": values,
                "start_over_empty": median(slower),
                "first_ms": first[way, mb] * 1e3,
                "stats": info[way, mb],
            }
        )
    for template in templates.values():
        template.close()
    return rows


async def sharing(mb: int, workers: int) -> list[dict[str, Any]]:
    rows = []
    for name, freeze, off in (
        ("frozen", True, ""),
        ("not frozen", False, ""),
        ("not frozen, without huge pages", False, "arena,collapse"),
    ):
        template = make(mb, off, freeze).eval(IN_TEMPLATE).eval(TELL)
        await template.ready()
        alone = await call(template, "tell")
        info = await call(template, "stats")
        socks, found = [], []
        for _ in range(workers):  # one after the other, but all live to the end
            socks.append(await template.fork().run("reader"))
            found.append(await answer(socks[-1]))
        rows.append(
            {
                "way": name,
                "private_mib": median(kb for kb, _, _ in found) / 1024,
                "private_mib_max": max(kb for kb, _, _ in found) / 1024,
                "first_scan_over_template": median(t for _, t, _ in found) / alone,
                "second_scan_over_template": median(t for _, _, t in found) / alone,
                "template_ms": alone * 1e3,
                "stats": info,
            }
        )
        for sock in socks:
            sock.close()
        template.close()
    return rows


def memory_of(pid: int) -> dict[str, int]:
    with open(f"/proc/{pid}/smaps_rollup") as file:
        rows = (line.split() for line in file)
        return {row[0][:-1]: int(row[1]) for row in rows if len(row) == 3}


async def idle(workers: int) -> dict[str, Any]:
    """PSS and private memory of idle workers of a lean template."""
    template = afork.Fork.new_exec().eval(WORKER)
    forks = [template.fork() for _ in range(workers)]
    socks = [await f.run("idle") for f in forks]
    found = [memory_of(f.pid) for f in forks]
    for sock in socks:
        sock.close()
    template.close()
    return {
        "workers": workers,
        "pss_mb": median(one["Pss"] for one in found) * 1.024e-3,
        "private_kb": median(one["Private_Dirty"] for one in found),
    }


def line(name: object, *values: object) -> None:
    print(f"{name:36}" + "".join(f"{value:>10}" for value in values))


def show(result: dict[str, Any]) -> None:
    line("starts from a template", "MB", "1/s", "x empty", "first ms")
    for row in result["rates"]:
        rate, slower = f"{row['per_second']:.0f}", f"{row['start_over_empty']:.2f}"
        line(row["way"], f"{row['mb']:.0f}", rate, slower, f"{row['first_ms']:.1f}")
    for mb, rate in result["os_fork"].items():
        line("os.fork, the same objects", mb, f"{rate:.0f}")
    print()
    line("134 MB of dicts, many readers", "MiB each", "max", "scan 1", "scan 2")
    for row in result["sharing"]:
        line(
            row["way"],
            f"{row['private_mib']:.2f}",
            f"{row['private_mib_max']:.2f}",
            f"{row['first_scan_over_template']:.2f}x",
            f"{row['second_scan_over_template']:.2f}x",
        )
    one = result["idle"]
    print(f"\nidle lean worker, one of {one['workers']}: ", end="")
    print(f"PSS {one['pss_mb']:.2f} MB, private {one['private_kb']} kB")


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "rates": await rates(args.sizes, args.rounds, args.seconds),
        "sharing": await sharing(134, args.workers),
        "idle": await idle(100),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 150, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each round")
    parser.add_argument("--workers", type=int, default=20)
    parser.add_argument("--json", help="write the numbers there")
    args = parser.parse_args()
    peers = {mb: os_fork(mb, args.seconds) for mb in args.sizes}  # before any thread
    result = {**asyncio.run(measure(args)), "os_fork": peers}
    show(result)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
