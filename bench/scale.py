#!/usr/bin/env python3
"""The part of the benchmark that asks what happens when there is more of something.

A larger application, bursts, workers that live, templates side by side, callbacks at
fork, programs of several kinds. Ours beside its peers and limit programs in C, in
alternating rounds; see ``--help``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import record
import targets
from contenders import Job, _same_image, app_command, limits_command
from part import Entry, Results, Row, by_round, c_command, first_command, main, p50

GAP = 0.002  # seconds in which the last worker ends, where starts are timed one by one
SIZES = (20, 200, 1024, 4096)
BURSTS = (100, 1000)
LIVE = (0, 100, 1000, 5000)

APPLICATION = "application of so many MB, touched: one at a time, byte and end"
BURST = "bursts: from the request for all to the byte of the first, middle, last"
ALIVE = "workers that sleep meanwhile: to the first byte, one at a time"
TEMPLATES = "templates side by side: byte and end (C: end), so many in flight"
CALLBACKS = "at-fork callbacks in the template: byte and end (C: end)"
PROGRAMS = "programs: stdio on /dev/null, wait for the status"


def applications() -> list[Entry]:
    ways: list[tuple[str, str, Callable[[int], Callable[[Job], list[str]]]]] = [
        ("c", "C fork", lambda mb: c_command("one", mb=mb)),
        ("os-fork", "os.fork", lambda mb: first_command("os-fork", "one", mb=mb)),
        (
            "forkserver",
            "multiprocessing forkserver",
            lambda mb: first_command("forkserver", "one", mb=mb),
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
        if key != "forkserver" or mb in (SIZES[0], SIZES[-1])
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


def side_by_side() -> list[Entry]:
    return [
        Entry(
            f"{key}-{n}/{k}",
            label,
            TEMPLATES,
            app_command(f"scaling.{function}", k),
            k,
            limit=f"loops-{n}/{k}",
            columns={"templates": n, "in_flight": k},
        )
        for k in (16, 64)
        for n, c, ours in (
            (1, "one_c_loop", "one_template"),
            (2, "two_c_loops", "two_templates"),
        )
        for key, label, function in (
            ("loops", "C loops", c),
            ("templates", "afork", ours),
        )
    ]


def callbacks() -> list[Entry]:
    return [
        Entry("hooks-c", "C fork of the template's image", CALLBACKS, _same_image(1)),
        *(
            Entry(
                f"hooks-{name}",
                label,
                CALLBACKS,
                app_command(f"scaling.hooks_{name}"),
                limit="hooks-c",
            )
            for name, label in (
                ("0", "afork, none"),
                ("1", "afork, 1 callback"),
                ("5", "afork, 5 callbacks"),
                ("threading", "afork, import threading"),
                ("asyncio", "afork, import asyncio, logging"),
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


def entries() -> list[Entry]:
    return [
        *applications(),
        *bursts(),
        *alive(),
        *side_by_side(),
        *callbacks(),
        *programs(),
    ]


if __name__ == "__main__":
    sys.exit(main("scale", (__doc__ or "").splitlines()[0], entries(), aims, 0.15, 3))
