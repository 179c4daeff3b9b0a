#!/usr/bin/env python3
"""The part of the benchmark that asks what happens when there is more of something.

A larger application, bursts, workers that live, templates side by side, callbacks at
fork, programs of several kinds. Ours beside its peers and limit programs in C, in
alternating rounds; see ``--help``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import part
import record
import targets
from contenders import Contender, Job, app_command, limits_command, same_image_command
from entries import (
    Entry,
    Results,
    Row,
    by_round,
    c_command,
    first_command,
    p50,
    render,
    summary,
)
from meter import Sample

GAP = 0.002  # seconds in which the last worker ends, where starts are timed one by one
SIZES = (20, 200, 1024, 4096)
#: Of the others two sizes are enough to see that it is the same with each.
FLAT = {"forkserver": (20, 4096), "billiard": (20, 1024), "pebble": (20, 1024)}
FLAT["loky"] = FLAT["pebble"]
BURSTS = (100, 1000)
LIVE = (0, 100, 1000, 5000)

APPLICATION = "application of so many MB, touched: one at a time, byte and end"
BURST = "bursts: from the request for all to the byte of the first, middle, last"
ALIVE = "workers that sleep meanwhile: to the first byte, one at a time"
MANY = "fork_many and its runs: the loop stands still, beside so many socket pairs"
TEMPLATES = "templates side by side: byte and end (C: end), so many in flight"
CALLBACKS = "at-fork callbacks in the template: byte and end (C: end)"
PROGRAMS = "programs: stdio on /dev/null, wait for the status"


def applications() -> list[Entry]:
    ways: list[tuple[str, str, Callable[[int], Callable[[Job], list[str]]]]] = [
        ("c", "C fork", lambda mb: c_command("one", mb=mb)),
        ("os-fork", "os.fork", lambda mb: first_command("os-fork", "one", mb=mb)),
        *(
            (key, label, lambda mb, key=key: first_command(key, "one", mb=mb))
            for key, label in (
                ("forkserver", "multiprocessing forkserver"),
                ("billiard", "billiard forkserver"),
                ("pebble", "pebble asynchronous.process"),
                ("loky", "loky, a pool of one"),
            )
        ),
        ("afork", "afork", lambda mb: first_command("afork", "one", mb=mb)),
    ]
    return [
        Entry(
            f"app-{key}@{mb}m",
            label,
            APPLICATION,
            command(mb),
            limit=f"app-c@{mb}m",
            columns={"app_mb": mb},
        )
        for mb in SIZES
        for key, label, command in ways
        if mb in FLAT.get(key, SIZES)
    ]


def bursts() -> list[Entry]:
    ways = [
        ("os-fork", "os.fork"),
        ("forkserver", "multiprocessing forkserver"),
        ("afork", "afork fork_many"),
    ]
    listed = []
    for size in BURSTS:
        columns = {"burst": size}
        limit = f"burst-c/{size}"
        commands = [
            ("c", "C fork", c_command("burst", size=size, gap=0.02)),
            *(
                (key, label, first_command(key, "burst", size=size, gap=0.02))
                for key, label in ways
            ),
        ]
        listed += [
            Entry(
                f"burst-{key}/{size}",
                label,
                BURST,
                command,
                limit=limit,
                columns=columns,
                size=size,
            )
            for key, label, command in commands
        ]
    return listed


def alive() -> list[Entry]:
    return [
        Entry(
            f"live-{key}/{n}",
            label,
            ALIVE,
            command,
            limit=f"live-c/{n}",
            columns={"live": n, "by": "p50"},
        )
        for n in LIVE
        for key, label, command in (
            ("c", "C fork", c_command("one", live=n, gap=GAP)),
            ("afork", "afork", first_command("afork", "one", live=n, gap=GAP)),
        )
    ]


def many() -> list[Entry]:
    command = app_command(f"scaling.many:{BURSTS[-1]}")
    columns = {"burst": BURSTS[-1]}
    return [Entry("many", "afork fork_many", MANY, command, columns=columns)]


def side_by_side() -> list[Entry]:
    return [
        Entry(
            f"{key}-{n}/{k}",
            label,
            TEMPLATES,
            app_command(f"scaling.{function}:{n}", k),
            k,
            limit=f"loops-{n}/{k}",
            columns={"templates": n, "in_flight": k},
        )
        for k in (16, 64)
        for n in (1, 2)
        for key, label, function in (
            ("loops", "C loops", "c_loops"),
            ("templates", "afork", "templates"),
        )
    ]


def callbacks() -> list[Entry]:
    return [
        Entry(
            "hooks-c",
            "C fork of the template's image",
            CALLBACKS,
            same_image_command(1),
        ),
        *(
            Entry(
                f"hooks-{name}",
                label,
                CALLBACKS,
                app_command(f"scaling.hooks:{modules or name}"),
                limit="hooks-c",
            )
            for name, label, modules in (
                ("0", "afork, none", ""),
                ("1", "afork, 1 callback", ""),
                ("5", "afork, 5 callbacks", ""),
                ("threading", "afork, import threading", "threading"),
                ("asyncio", "afork, import asyncio, logging", "asyncio,logging"),
            )
        ),
    ]


def programs() -> list[Entry]:
    tiny = str(record.BUILD / "bench" / "tiny")
    slow = [sys.executable, "-I", "-S", "-c", "pass"]
    listed = []
    for name, label, program in (
        ("tiny", "tiny, static", [tiny]),
        ("true", "dynamic", ["/bin/true"]),
        ("slow", "slow to load (Python)", slow),
    ):
        chosen = ["env", "AFORK_BENCH_PROGRAM=" + ":".join(program)]
        for mb in (20, 1024) if name == "true" else (20,):

            def command(
                function: str, mb: int = mb, chosen: list[str] = chosen
            ) -> Callable[[Job], list[str]]:
                inner = app_command(f"programs.{function}", mb=mb)
                return lambda job: [*chosen, *inner(job)]

            limit = f"program-c-{name}@{mb}m"
            listed += [
                Entry(
                    f"program-{key}-{name}@{mb}m",
                    f"{label}: {by}",
                    PROGRAMS,
                    run,
                    limit=limit,
                    columns={"app_mb": mb},
                )
                for key, by, run in (
                    ("c", "C", limits_command("spawn", mb=mb, program=program)),
                    ("asyncio", "asyncio", command("asyncio_exec")),
                    ("afork", "afork", command("afork_exec_program")),
                )
            ]
    return listed


def stall_of_bare(sample: Sample) -> float | None:
    return sample["stall_ms"] / sample["bare_ms"] if "bare_ms" in sample else None


def aims(results: Results) -> list[Row]:
    def rates(over: str, under: str) -> list[float]:
        return by_round(results, over, under, targets.rate)

    alive = by_round(results, "live-afork/5000", "live-afork/0", p50)
    return [
        targets.at_least(
            "application of 4 GB / 20 MB",
            0.9,
            rates("app-afork@4096m", "app-afork@20m"),
        ),
        targets.at_least(
            "(C fork, 4 GB / 20 MB)", None, rates("app-c@4096m", "app-c@20m")
        ),
        targets.at_least(
            "(os.fork, 4 GB / 20 MB)",
            None,
            rates("app-os-fork@4096m", "app-os-fork@20m"),
        ),
        targets.at_most(
            "fork_many(1000), stall / bare pairs",
            1.5,
            targets.values_of(results, "many", stall_of_bare),
            "x",
        ),
        targets.at_most(
            "application's CPU per start, fork_many(1000)",
            50,
            targets.values_of(results, "many", targets.cpu),
            " us",
        ),
        targets.at_most("5,000 alive / none, p50", 1.5, alive, "x"),
        targets.at_least(
            "(C fork, 5,000 alive / none)",
            None,
            by_round(results, "live-c/5000", "live-c/0", p50),
        ),
        targets.at_least(
            "(two templates / one, 16 in flight)",
            None,
            rates("templates-2/16", "templates-1/16"),
        ),
        targets.at_least(
            "(two templates / one, 64 in flight)",
            None,
            rates("templates-2/64", "templates-1/64"),
        ),
    ]


def entries() -> list[Contender]:
    return [
        *applications(),
        *bursts(),
        *alive(),
        *many(),
        *side_by_side(),
        *callbacks(),
        *programs(),
    ]


if __name__ == "__main__":
    sys.exit(
        part.main("scale", __doc__, entries(), summary, render, aims, seconds=0.15)
    )
