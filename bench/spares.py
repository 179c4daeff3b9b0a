#!/usr/bin/env python3
"""Starts from spares, many at once, and with many alive.

Request to first byte from user code, cold and with a spare ready, beside a
socketpair ping-pong; the stall of ``fork_many(1000)`` and its runs beside as many
bare socket pairs; a start while thousands of workers sleep.

Rounds alternate; printed are medians over the rounds. The rounds are measured in
one process, whose garbage is collected before each. ``python bench/spares.py
--help``.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import resource
import socket
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import record
import table
import targets

import afork

CODE = """
def go(sock):
    sock.send(b"x")

def sleep(sock):
    sock.recv(1)
"""


def ping_pong(n: int, gap: float) -> float:
    """Median of a round trip between two processes, in us."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        while data := theirs.recv(1):
            theirs.send(data)
        os._exit(0)
    theirs.close()
    times = []
    for _ in range(n):
        time.sleep(gap)
        begin = time.perf_counter()
        ours.send(b"x")
        ours.recv(1)
        times.append(time.perf_counter() - begin)
    ours.close()
    os.waitpid(pid, 0)
    return statistics.median(times) * 1e6


async def first_byte(template: afork.Fork) -> float:
    begin = time.perf_counter()
    sock = await template.fork().run("go")
    await asyncio.get_running_loop().sock_recv(sock, 1)
    seconds = time.perf_counter() - begin
    sock.close()
    return seconds * 1e6


async def starts(template: afork.Fork, n: int, gap: float) -> float:
    times = []
    for _ in range(n):
        await asyncio.sleep(gap)
        times.append(await first_byte(template))
    return statistics.median(times)


async def full(template: afork.Fork, n: int) -> None:
    # They tell nobody: there is no event to wait for.
    while (await template.stats())["spares"]["ready"] < n:  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def latency(args: argparse.Namespace) -> dict[str, float]:
    template = afork.Fork.new_exec().eval(CODE)
    await template.ready()
    cold = await starts(template, args.starts, args.gap)
    template.spares(4)
    await full(template, 4)
    warm = await starts(template, args.starts, args.gap)
    told = (await template.stats())["spares"]
    template.close()
    await template.wait()
    ping = ping_pong(args.starts, args.gap)
    return {
        "cold us": cold,
        "spare us": warm,
        "ping-pong us": ping,
        "cold / spare": cold / warm,
        "spare / ping-pong": warm / ping,
        "hits": told["hits"] / (told["hits"] + told["misses"]),
    }


async def longest_stall(stop: asyncio.Event, worst: list[float]) -> None:
    while not stop.is_set():
        begin = time.perf_counter()
        await asyncio.sleep(0.001)
        worst.append(time.perf_counter() - begin - 0.001)


async def many(args: argparse.Namespace) -> dict[str, float]:
    n = args.many
    begin = time.perf_counter()
    pairs = [socket.socketpair() for _ in range(n)]
    bare = time.perf_counter() - begin
    for a, b in pairs:
        a.close()
        b.close()
    del pairs
    template = afork.Fork.new_exec().eval(CODE)
    await template.ready()

    async def run(watch: bool) -> tuple[float, float, float]:
        worst: list[float] = [0.0]
        stop = asyncio.Event()
        ticker = asyncio.create_task(longest_stall(stop, worst)) if watch else None
        await asyncio.sleep(0.01)
        cpu, begin = time.process_time(), time.perf_counter()
        forks = template.fork_many(n)
        runs = [f.run("go") for f in forks]
        call = time.perf_counter() - begin
        socks = [await run for run in runs]
        cpu = time.process_time() - cpu
        for sock in socks:
            sock.close()
        stop.set()
        if ticker is not None:
            await ticker
        for f in forks:
            await f.wait()
        return call, max(worst), cpu

    await run(False)
    _, _, cpu = await run(False)
    call, worst, _ = await run(True)
    template.close()
    await template.wait()
    return {
        "bare pairs ms": bare * 1e3,
        "fork_many + runs ms": call * 1e3,
        "longest stall ms": worst * 1e3,
        "stall / bare pairs": worst / bare,
        "app CPU us per start": cpu / n * 1e6,
    }


async def alive(args: argparse.Namespace) -> dict[str, float]:
    template = afork.Fork.new_exec().eval(CODE)
    await template.ready()
    before = await starts(template, args.starts, args.gap)
    socks = []
    for _ in range(args.alive // 500):
        forks = template.fork_many(500)
        socks += [await f.run("sleep") for f in forks]
    after = await starts(template, args.starts, args.gap)
    for sock in socks:
        sock.close()
    template.close()
    await template.wait()
    return {"none us": before, f"{args.alive} alive us": after, "ratio": after / before}


SCENARIOS: dict[str, Callable[[Any], Awaitable[dict[str, float]]]] = {
    "latency": latency,
    "many": many,
    "alive": alive,
}


#: What each is called in the record.
LABELS = {
    "latency": "request to first byte: cold, from a spare",
    "many": "fork_many and its runs",
    "alive": "a start while workers sleep",
}


def column(name: str) -> str:
    """``cold us`` as ``cold_us``."""
    return name.replace(" / ", "_over_").translate(str.maketrans(" -+", "___"))


def aims(rounds: dict[str, list[dict[str, float]]]) -> list[targets.Row]:
    """Issue 5, "How fast", as far as it is measured here."""

    def found(scenario: str, name: str) -> list[float]:
        return [row[name] for row in rounds.get(scenario, [])]

    ping, cold = found("latency", "spare / ping-pong"), found("latency", "cold / spare")
    stall, cpu = (
        found("many", "stall / bare pairs"),
        found("many", "app CPU us per start"),
    )
    return [
        targets.at_most("spare / ping-pong, p50", 3, ping, "x"),
        targets.at_least("cold / spare, p50", 5, cold),
        targets.at_most("fork_many(1000), stall / bare pairs", 1.5, stall, "x"),
        targets.at_most("application's CPU per start, fork_many(1000)", 50, cpu, " us"),
        targets.at_most("5,000 alive / none, p50", 1.5, found("alive", "ratio"), "x"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scenarios", nargs="*", default=[*SCENARIOS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--starts", type=int, default=200)
    parser.add_argument("--gap", type=float, default=0.004, help="seconds between")
    parser.add_argument("--many", type=int, default=1000)
    parser.add_argument("--alive", type=int, default=5000)
    parser.add_argument("--json", type=Path, default=record.path("spares"))
    args = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = 3 * max(args.many, args.alive) + 1000
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

    about = record.about(rounds=args.rounds, starts=args.starts, gap=args.gap)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in args.scenarios}
    for _ in range(args.rounds):
        for name in args.scenarios:
            gc.collect()
            rounds[name].append(asyncio.run(SCENARIOS[name](args)))
    summary: dict[str, dict[str, Any]] = {}
    for name, found in rounds.items():
        print(f"\n{name}: median of {len(found)} rounds")
        summary[name] = {"label": LABELS[name]}
        for key in found[0]:
            values = [row[key] for row in found]
            low, high = min(values), max(values)
            mid = summary[name][column(key)] = statistics.median(values)
            print(f"  {key:24} {mid:10.2f}   ({low:.2f} .. {high:.2f})")
    reached = aims(rounds)
    print("\n" + "\n".join(table.target_lines(reached)))
    record.write(args.json, record.document(about, summary, reached, rounds))


if __name__ == "__main__":
    main()
