#!/usr/bin/env python3
"""The part of the benchmark that asks how long one start takes, in percentiles.

From the request to the first byte of user code: one at a time, from spares of several
depths, and under a load that does not wait for us. Ours beside its peers and limit
programs in C, in alternating rounds; see ``--help``.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable

import targets
from contenders import HERE, Job
from meter import Unavailable
from part import Entry, Results, Row, by_round, c_command, first_command, main, p50

GAP = 0.003  # seconds between starts: the last worker ends, a spare is made anew
DEPTHS = (0, 1, 4, 16)
RATES = (100, 500, 1000, 3000)

ONE = "one at a time, the last worker has ended: to the first byte"
SPARES = "spares, in bursts of 1 to 16: to the first byte (of each in the burst)"
OPEN = "so many per second, each from when it was due, to its first byte"


def _lean(job: Job) -> list[str]:
    script = str(HERE / "lean_fork.py")
    options = ["1", str(job.seconds), str(job.count), str(GAP)]
    return [sys.executable, "-I", "-S", script, *options]


def _perl(job: Job) -> list[str]:
    perl = shutil.which("perl")
    if perl is None:
        raise Unavailable("no perl")
    script = str(HERE / "anyevent_fork.pl")
    return [perl, script, "new", "1", str(job.seconds), str(job.count), str(GAP)]


def one() -> list[Entry]:
    ways: list[tuple[str, str, Callable[[Job], list[str]]]] = [
        ("pong", "C: a byte to a waiting process and back", c_command("pong", gap=GAP)),
        ("c", "C fork", c_command("one", gap=GAP)),
        ("lean", "os.fork, python -I -S", _lean),
        ("perl", "Perl AnyEvent::Fork->new", _perl),
        ("afork", "afork, cold", first_command("afork", "one", gap=GAP)),
        (
            "spare",
            "afork, spare ready",
            first_command("afork", "one", depth=4, gap=GAP),
        ),
        *(
            (key, label, first_command(key, "one", gap=GAP))
            for key, label in (
                ("os-fork", "os.fork, in the application"),
                ("forkserver", "multiprocessing forkserver, preloaded"),
                ("spawn", "multiprocessing spawn"),
                ("subprocess", "subprocess, python -I -S -c"),
                ("thread", "(threading.Thread: no process)"),
                ("idle-pool", "(idle pool worker: no start)"),
            )
        ),
    ]
    return [
        Entry(f"one-{key}", label, ONE, command, limit="one-c", columns={"by": "p50"})
        for key, label, command in ways
    ]


def spares() -> list[Entry]:
    return [
        Entry(
            f"spares-{depth}/{size}",
            "afork",
            SPARES,
            first_command("afork", "burst", depth=depth, size=size, gap=0.02),
            limit=f"spares-0/{size}",
            columns={"depth": depth, "burst": size, "by": "p50"},
        )
        for size in (1, 4, 16)
        for depth in DEPTHS
    ]


def load() -> list[Entry]:
    return [
        Entry(
            f"open-{key}/{rate}",
            label,
            OPEN,
            command,
            limit=f"open-c/{rate}",
            columns={"asked": rate, "by": "p50"},
        )
        for rate in RATES
        for key, label, command in (
            ("c", "C fork", c_command("open", size=rate)),
            ("os-fork", "os.fork", first_command("os-fork", "open", size=rate)),
            (
                "forkserver",
                "multiprocessing forkserver",
                first_command("forkserver", "open", size=rate),
            ),
            ("afork", "afork", first_command("afork", "open", size=rate)),
            (
                "spares",
                "afork, 4 spares",
                first_command("afork", "open", size=rate, depth=4),
            ),
        )
        if rate <= 500 or key != "forkserver"
    ]


def aims(results: Results) -> list[Row]:
    def over(one: str, other: str) -> list[float]:
        return by_round(results, one, other, p50)

    return [
        targets.at_most(
            "spare / ping-pong of C, p50", 3, over("one-spare", "one-pong"), "x"
        ),
        targets.at_least(
            "cold / spare, p50, beside the peers", 5, over("one-afork", "one-spare")
        ),
        targets.at_least(
            "(forkserver / cold, p50)", None, over("one-forkserver", "one-afork")
        ),
        targets.at_least("(cold / thread, p50)", None, over("one-afork", "one-thread")),
    ]


def entries() -> list[Entry]:
    return [*one(), *spares(), *load()]


if __name__ == "__main__":
    about = (__doc__ or "").splitlines()[0]
    sys.exit(main("latency", about, entries(), aims, 0.4, 3))
