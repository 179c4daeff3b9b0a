"""The numbers that issue 4 asks for ("How fast"), each reached or not."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from call_contenders import PEERS
from meter import Sample
from targets import Results, Row, at_least, at_most, by_round, rate, ratios, values_of

KIB = 1024


def times(results: Results, ours: str, theirs: str) -> list[float]:
    """Our time over theirs, round by round."""
    return [1 / ratio for ratio in ratios(results, ours, theirs)]


def over_best_peer(results: Results) -> list[float]:
    """Our rate over that of whichever peer was the fastest in that round."""
    peers = [by_round(results, f"one/{key}", rate) for key in PEERS]
    best = [
        max((x for x in them if x), default=None)
        for them in zip(*(p for p in peers if p), strict=False)
    ]
    ours = by_round(results, "one/rpc-free", rate)
    return [
        mine / other for mine, other in zip(ours, best, strict=False) if mine and other
    ]


def warm(sample: Sample) -> float | None:
    """Seconds with the template, or the forkserver, up."""
    return median(sample["warm_ms"]) / 1e3 if "warm_ms" in sample else None


def cold(sample: Sample) -> float | None:
    return sample.get("seconds")


def _over(
    results: Results,
    ours: Callable[[Sample], float | None],
    theirs: Callable[[Sample], float | None],
) -> list[float]:
    pairs = zip(
        by_round(results, "cold/pool", ours),
        by_round(results, "cold/ppe", theirs),
        strict=False,
    )
    return [mine / other for mine, other in pairs if mine and other]


def middle(name: str) -> Callable[[Sample], float | None]:
    """The median of a round's list."""
    return lambda sample: median(sample[name]) if sample.get(name) else None


def stall(sample: Sample) -> float | None:
    return sample["ticker"]["max_ms"] if "ticker" in sample else None


def memory(sample: Sample) -> float | None:
    return sample.get("bytes")


def targets(results: Results) -> list[Row]:
    """Rows that begin with "(" are no targets but say more about the one above."""
    rows = []
    for name, bound, key in (
        ("one rpc call / ping-pong, time", 2.0, "rpc"),
        ("(uvloop)", 2.0, "rpc-uvloop"),
        ("one Pool call / ping-pong, time", 2.5, "pool"),
        ("(uvloop)", 2.5, "pool-uvloop"),
    ):
        values = times(results, f"one/{key}", "one/limit")
        rows.append(at_most(name, bound, values, "x"))
    for name, bound, key in (
        ("(rpc, all on one processor)", 2.0, "rpc"),
        ("(Pool, all on one processor)", 2.5, "pool"),
    ):
        # There a ping-pong is four system calls and no processor to be woken.
        values = times(results, f"together/{key}", "together/limit")
        rows.append({**at_most(name, bound, values, "x"), "reached": None})
    rows += [
        at_least(
            "one rpc call / PPE, rate", 2.5, ratios(results, "one/rpc-free", "one/ppe")
        ),
        at_least("one rpc call / fastest peer, rate", 1.0, over_best_peer(results)),
    ]
    for name, bound, key in (
        ("rpc / PPE, 64 in flight", 15.0, "rpc"),
        ("(uvloop)", 15.0, "rpc-uvloop"),
        ("(a window of futures)", 15.0, "rpc-window"),
        ("Pool / PPE, 64 in flight", 10.0, "pool"),
        ("(uvloop)", 10.0, "pool-uvloop"),
    ):
        rows.append(at_least(name, bound, ratios(results, f"many/{key}", "many/ppe")))
    for name, key in (("array", "bulk-array"), ("bytearray", "bulk-bytes")):
        rows.append(
            at_least(
                f"64 MiB {name}, copied / PPE, rate",
                5.0,
                ratios(results, f"{key}/pool", f"{key}/ppe"),
            )
        )
    rows += [
        # Nothing that grows with the size: the rest is what the machine varies by.
        at_most(
            "SharedBuffer, 256 MiB / 1 MiB, time",
            1.25,
            times(results, "shared/256", "shared/1"),
            "x",
        ),
        at_most("4 workers from nothing / PPE", 0.2, _over(results, cold, cold), "x"),
        {
            # What no template can undercut: the target is out of reach with numpy.
            **at_most(
                "(python -c 'import numpy' / PPE)",
                0.2,
                times(results, "cold/limit", "cold/ppe"),
                "x",
            ),
            "reached": None,
        },
        at_most("4 workers, template up / PPE", 0.05, _over(results, warm, cold), "x"),
        at_most("(PPE's forkserver up, too)", 0.05, _over(results, warm, warm), "x"),
    ]
    for name, key in (
        ("worker killed", "lost-kill/pool"),
        ("call cancelled", "lost-cancel/pool"),
    ):
        for what, value in (("caller knows", "knows_ms"), ("next answer", "next_ms")):
            values = values_of(results, key, middle(value))
            rows.append(at_most(f"{name}: {what}", 5, values, " ms"))
    for key, name in (("rpc", "rpc"), ("pool", "Pool")):
        for suffix, how in (("", "RSS"), ("-traced", "traced")):
            values = values_of(results, f"queue/{key}{suffix}", memory)
            rows.append(at_most(f"queued {name} call, {how}", KIB, values, " B"))
        values = values_of(results, f"queue/{key}", stall)
        rows.append(at_most(f"longest stall, {name} drains", 10, values, " ms"))
    values = values_of(results, "queue/bare", stall)
    rows.append({**at_most("(bare futures)", 10, values, " ms"), "reached": None})
    return rows
