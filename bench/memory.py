#!/usr/bin/env python3
"""The part of the benchmark about memory: a large template, and what workers share.

1. starts per second from templates of 0, 150 MB and 1 GB of Python objects, with and
   without huge pages, beside ``os.fork`` of a process with the same objects;
2. 134 MB of dicts read by each of 20 workers that live side by side, frozen or not:
   private memory beyond what a worker allocates itself, and the time of the scan
   against the same scan in the template;
3. the memory of one idle worker among 1, 100 and 1,000, beside bare children in C,
   and those of the peers; with numpy and pandas preloaded (living.py).

The ways alternate; printed are medians. See ``--help``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import living
import record
import rounds
import table
import targets

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


def size_of(info: dict[str, Any]) -> int:
    """What a template has for itself, in bytes."""
    return int(info["private_bytes"]) + int(info["file_bytes"])


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
                "nominal_mb": mb,
                "mb": size_of(info[way, mb]) / 1e6,
                "per_second": median(values),
                "all": values,
                "start_over_empty": median(slower),
                "all_over_empty": slower,
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


def rows_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The summary of the record."""
    rows: dict[str, dict[str, Any]] = {}
    for row in result["rates"]:
        rows[f"starts/{row['way']}@{row['nominal_mb']}m"] = {
            "label": row["way"],
            "template_mb": row["mb"],
            "rate": row["per_second"],
            "start_over_empty": row["start_over_empty"],
            "first_ms": row["first_ms"],
        }
    for mb, rate in result["os_fork"].items():
        label = "os.fork, the same objects"
        rows[f"starts/os.fork@{mb}m"] = {
            "label": label,
            "template_mb": mb,
            "rate": rate,
        }
    for row in result["sharing"]:
        rows[f"readers/{row['way']}"] = {
            "label": row["way"],
            "private_mib": row["private_mib"],
            "private_max_mib": row["private_mib_max"],
            "first_scan_over_template": row["first_scan_over_template"],
            "second_scan_over_template": row["second_scan_over_template"],
        }
    for key, row in result["living"].items():
        rows[f"workers/{key}"] = {k: v for k, v in row.items() if k != "all"}
    return rows


def aims(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Issue 5, "How fast", as far as it is about memory."""
    slower = {
        row["nominal_mb"]: row["all_over_empty"]
        for row in result["rates"]
        if row["way"] == "afork"
    }
    frozen = [row for row in result["sharing"] if row["way"] == "frozen"]
    if sys.version_info < (3, 12):
        frozen = []  # nothing is immortal there: gc.freeze() only
    alive = result["living"]
    idle = [one["pss_mb"] for one in alive["afork/100"]["all"]]
    heavy = [
        one["private_mb"] * 1e6 / (1 << 20) for one in alive["afork-pandas/100"]["all"]
    ]
    private = [row["private_mib"] for row in frozen]
    scan = [row["first_scan_over_template"] for row in frozen]
    return [
        targets.at_most("template of 150 MB / empty", 1.5, slower.get(150, []), "x"),
        targets.at_most("template of 1 GB / empty", 2, slower.get(1000, []), "x"),
        targets.at_most("frozen dicts, private a worker", 3, private, " MiB"),
        targets.at_most("frozen dicts, scan / in the template", 1.1, scan, "x"),
        targets.at_most("idle lean worker, PSS", 0.35, idle, " MB"),
        targets.at_most("numpy and pandas, private a worker", 3, heavy, " MiB"),
    ]


#: Which columns of which rows are a table.
TABLES = {
    "starts": ("template_mb", "rate", "start_over_empty", "first_ms"),
    "readers": (
        "private_mib",
        "private_max_mib",
        "first_scan_over_template",
        "second_scan_over_template",
    ),
    "workers": (
        "workers",
        "pss_mb",
        "private_mb",
        "private_max_mb",
        "vmpte_kb",
        "template_pss_mb",
        "of_limit",
    ),
}


def cell(name: str, value: float | None) -> str:
    whole = name in ("rate", "workers", "vmpte_kb", "template_mb")
    return table.number(value, ".0f" if whole else ".2f")


def show(summary: dict[str, dict[str, Any]], found: list[dict[str, Any]]) -> None:
    for kind, names in TABLES.items():
        lines = []
        for key, row in summary.items():
            if key.startswith(kind + "/"):
                cells = [cell(name, row.get(name)) for name in names]
                remark = [row["skip"]] if "skip" in row else cells
                lines.append([row["label"], *remark])
        titles = [name.replace("_", " ") for name in names]
        print("\n".join(table.columns([kind, *titles], lines)), end="\n\n")
    print("\n".join(table.target_lines(found)))


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "rates": await rates(args.sizes, args.rounds, args.seconds),
        "sharing": await sharing(134, args.workers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 150, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each round")
    parser.add_argument("--living-rounds", type=int, default=3, help="of part 3")
    parser.add_argument("--workers", type=int, default=20)
    parser.add_argument("--json", type=Path, default=record.path("memory"))
    args = parser.parse_args()
    limits = rounds.build_limits(record.BUILD / "bench", "limits_first")
    about = record.about(rounds=args.rounds, seconds=args.seconds)
    peers = {mb: os_fork(mb, args.seconds) for mb in args.sizes}  # before any thread
    result = {**asyncio.run(measure(args)), "os_fork": peers}
    result["living"] = living.measure(limits, args.living_rounds)
    summary, found = rows_of(result), aims(result)
    show(summary, found)
    record.write(args.json, record.document(about, summary, found, result))


if __name__ == "__main__":
    sys.exit(main())
