#!/usr/bin/env python3
"""The part of the benchmark that asks how long one start takes, in percentiles.

From the request to the first byte of user code: one at a time, from spares of several
depths, and under a load that does not wait for us. Ours beside its peers and limit
programs in C, in alternating rounds; see ``--help``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import part
import targets
from contenders import Contender, Job, lean_command, perl_command
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

GAP = 0.004  # seconds between starts: the last worker ends, a spare is made anew
BRISK = 0.06  # seconds in which they follow one another without that
DEPTHS = (0, 1, 4, 16)
RATES = (100, 500, 1000, 3000)

ONE = "one at a time, the last worker has ended: to the first byte; limit: C fork"
READY = "a spare is ready, and what bounds it from below; limit: C's ping-pong"
SPARES = "spares, in bursts of 1 to 16: to the first byte (of each in the burst)"
OPEN = "so many per second, each from when it was due, to its first byte"

UVLOOP = {"loop": "uvloop"}


def _entries(
    prefix: str,
    scenario: str,
    limit: str,
    ways: list[tuple[str, str, Callable[[Job], list[str]]]],
) -> list[Entry]:
    columns = {"by": "p50"}
    return [
        Entry(f"{prefix}-{key}", label, scenario, command, limit=limit, columns=columns)
        for key, label, command in ways
    ]


def _first(way: str, **options: Any) -> Callable[[Job], list[str]]:
    return first_command(way, "one", gap=GAP, brisk=BRISK, **options)


def one() -> list[Entry]:
    ways = [
        ("c", "C fork", c_command("one", gap=GAP, brisk=BRISK)),
        ("lean", "os.fork, python -I -S", lean_command(1, GAP)),
        ("perl", "Perl AnyEvent::Fork->new", perl_command("new", 1, GAP)),
        ("afork", "afork, cold", _first("afork")),
        ("afork-uvloop", "afork, cold, uvloop", _first("afork", **UVLOOP)),
        *(
            (key, label, _first(key))
            for key, label in (
                ("os-fork", "os.fork, in the application"),
                ("forkserver", "multiprocessing forkserver, preloaded"),
                ("billiard", "billiard forkserver"),
                ("pebble", "pebble asynchronous.process, preloaded"),
                ("spawn", "multiprocessing spawn"),
                ("loky", "loky, a pool of one"),
                ("subprocess", "subprocess, python -I -S -c"),
                ("thread", "(threading.Thread: no process)"),
                ("idle-pool", "(idle pool worker: no start)"),
            )
        ),
    ]
    return _entries("one", ONE, "one-c", ways)


def ready() -> list[Entry]:
    floors = [
        ("blocking", "floor: Python waits; send, recv", {}),
        ("loop", "floor: Python waits; asyncio's sock_sendall, sock_recv", {}),
        ("loop", "floor: Python waits; uvloop's sock_sendall, sock_recv", UVLOOP),
        ("reader", "floor: Python waits; asyncio's add_reader", {}),
        ("reader", "floor: Python waits; uvloop's add_reader", UVLOOP),
        ("pass", "floor: a socket pair's end passed as well; asyncio", {}),
        ("pass", "floor: a socket pair's end passed as well; uvloop", UVLOOP),
        ("once", "floor: passed to a fork that serves once; asyncio", {}),
    ]
    ways = [
        (
            "pong",
            "C: a byte to a waiting process and back",
            c_command("pong", gap=GAP, brisk=BRISK),
        ),
        *(
            (f"{key}-uvloop" if loop else key, label, _first(f"floor-{key}", **loop))
            for key, label, loop in floors
        ),
        ("afork", "afork, spare ready", _first("afork", depth=4)),
        (
            "afork-uvloop",
            "afork, spare ready, uvloop",
            _first("afork", depth=4, **UVLOOP),
        ),
    ]
    return _entries("ready", READY, "ready-pong", ways)


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

    spare = "ready-afork"
    return [
        targets.at_most(
            "spare / ping-pong of C, p50", 3, over(spare, "ready-pong"), "x"
        ),
        *(
            targets.at_least(f"({name})", None, over(one, other))
            for name, one, other in (
                ("spare / ping-pong in Python", spare, "ready-blocking"),
                ("floor, asyncio / ping-pong of C", "ready-loop", "ready-pong"),
                ("floor, end passed / ping-pong of C", "ready-pass", "ready-pong"),
                ("floor, serves once / ping-pong of C", "ready-once", "ready-pong"),
                ("spare / floor, serves once", spare, "ready-once"),
            )
        ),
        targets.at_least("cold / spare, p50", 5, over("one-afork", spare)),
        targets.at_least(
            "(cold / floor, serves once)",
            None,
            over("one-afork", "ready-once"),
        ),
        targets.at_least(
            "(forkserver / cold, p50)", None, over("one-forkserver", "one-afork")
        ),
        targets.at_least("(cold / thread, p50)", None, over("one-afork", "one-thread")),
    ]


def entries() -> list[Contender]:
    return [*one(), *ready(), *spares(), *load()]


if __name__ == "__main__":
    sys.exit(
        part.main("latency", __doc__, entries(), summary, render, aims, seconds=0.4)
    )
