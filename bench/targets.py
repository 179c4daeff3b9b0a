"""The numbers that issues 3 and 5 ask for ("How fast"), each reached or not.

Where both ask, the harder one is here.

Ratios are taken round by round, so that what slows a whole round cancels out; their
median decides.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from meter import Sample

Results = dict[str, list[Sample]]
Row = dict[str, Any]


def rate(sample: Sample) -> float | None:
    """Starts per second, or None where the contender did not run."""
    return sample["n"] / sample["seconds"] if sample.get("n") else None


def cpu(sample: Sample) -> float | None:
    return sample.get("cpu_us")


def added_p99(sample: Sample) -> float | None:
    """The ticker's p99 lateness in ms: during starts, over that of the ticker alone."""
    if "ticker" not in sample:
        return None
    return float(sample["ticker"]["p99_ms"] - sample["ticker_alone"]["p99_ms"])


def by_round(
    results: Results, key: str, value: Callable[[Sample], float | None]
) -> list[float | None]:
    return [value(sample) for sample in results.get(key, [])]


def values_of(
    results: Results, key: str, value: Callable[[Sample], float | None]
) -> list[float]:
    return [one for one in by_round(results, key, value) if one is not None]


def ratios(results: Results, ours: str, theirs: str) -> list[float]:
    """Our rate over theirs, round by round: what slows a whole round cancels out."""
    pairs = zip(
        by_round(results, ours, rate), by_round(results, theirs, rate), strict=False
    )
    return [mine / other for mine, other in pairs if mine and other]


def _target(
    name: str,
    want: str,
    values: list[float],
    reached: Callable[[float], bool],
    unit: str = "x",
) -> Row:
    """``values`` by round.

    The median decides; the spread says how far to trust it. None decides nothing.
    """
    row: Row = {
        "name": name,
        "want": want,
        "unit": unit,
        "value": None,
        "low": None,
        "high": None,
        "reached": None,
    }
    if values:
        row.update(
            value=median(values),
            low=min(values),
            high=max(values),
            reached=reached(median(values)),
        )
    return row


def at_least(name: str, bound: float | None, values: list[float]) -> Row:
    if bound is None:  # nothing is asked of it
        return {**_target(name, "", values, lambda value: True), "reached": None}
    return _target(name, f">= {bound:g}x", values, lambda value: value >= bound)


def at_most(name: str, bound: float, values: list[float], unit: str) -> Row:
    return _target(
        name, f"<= {bound:g}{unit}", values, lambda value: value <= bound, unit
    )


def _stall(results: Results, name: str, size: str) -> Row:
    """The medians are compared, not the rounds.

    One round's added stall may be next to nothing, or below it.
    """
    ours = values_of(results, f"afork-program@{size}", added_p99)
    theirs = values_of(results, f"asyncio@{size}", added_p99)
    usable = bool(ours) and bool(theirs) and median(theirs) > 0
    row = at_most(
        name, 15, [100 * median(ours) / median(theirs)] if usable else [], " %"
    )
    row.update(
        ours_ms=median(ours) if ours else None,
        theirs_ms=median(theirs) if theirs else None,
    )
    return row


def _exec_over_limit(results: Results, limit: str) -> list[float]:
    """The time of one new_exec over that of the bare interpreter plus one fork.

    The fork is the cheapest there is, C's.
    """
    rounds = zip(
        *(by_round(results, key, rate) for key in ("afork-exec/1", limit, "c-fork/1")),
        strict=False,
    )
    return [
        (1 / ours) / (1 / bare + 1 / fork)
        for ours, bare, fork in rounds
        if ours and bare and fork
    ]


def _slowest_fault(results: Results) -> list[float]:
    slowest = []
    for sample in results.get("afork-faults", []):
        values = [
            ms
            for name, one in sample.get("faults", {}).items()
            if name != "next start after it"
            for ms in one["ms"]
        ]
        slowest += [max(values)] if values else []
    return slowest


# The ratios of starts per second: name, bound, ours, theirs. Rows that begin with "("
# are no targets but the same under a fairer comparison, or what the machine allows.
RATIOS: tuple[tuple[str, float | None, str, str], ...] = (
    ("Fork.new / Perl new, one at a time", 1.2, "afork-new/1", "perl-new/1"),
    ("(each worker imports a module)", 1.2, "afork-import/1", "perl-new/1"),
    ("Fork.new / forkserver preloaded", 8.0, "afork-new/1", "forkserver/1"),
    ("(both preloaded)", 8.0, "afork-preloaded/1", "forkserver/1"),
    ("(C limit / forkserver)", None, "c-fork/1", "forkserver/1"),
    ("(forkserver with main file)", 8.0, "afork-new/1", "forkserver-script/1"),
    ("Fork.new / Perl new, 16 in flight", 2.0, "afork-new/16", "perl-new/16"),
    ("(each worker imports a module)", 2.0, "afork-import/16", "perl-new/16"),
    ("Fork.new / C loop, same image, one", 0.7, "afork-new/1", "c-image/1"),
    ("Fork.new / C loop, same image, 16", 0.8, "afork-new/16", "c-image/16"),
    ("Fork.new, application 1 GB / 20 MB", 0.9, "afork-new@1g/1", "afork-new/1"),
    ("program / asyncio, 20 MB", 1.0, "afork-program@20m", "asyncio@20m"),
    ("program / asyncio, 1 GB", 1.0, "afork-program@1g", "asyncio@1g"),
    ("(C limit / asyncio, 20 MB)", None, "c-spawn@20m", "asyncio@20m"),
    ("program / uvloop, 1 GB", 5.0, "afork-program@1g", "uvloop@1g"),
)


def _faults_failed(results: Results) -> bool:
    """Whether one raised nothing, hung, or spoiled the benchmark."""
    return any(
        error.startswith("FAILED")
        for sample in results.get("afork-faults", [])
        for one in sample.get("faults", {}).values()
        for error in one["errors"]
    )


def targets(results: Results) -> list[Row]:
    """In one list: each row with its number, reached or not."""
    rows = [
        at_least(name, bound, ratios(results, ours, theirs))
        for name, bound, ours, theirs in RATIOS
    ]
    for name, limit in (
        ("new_exec / (python -c pass + fork)", "python-pass/1"),
        ("(python that skips its finalisation)", "python-exit/1"),
    ):
        rows.append(at_most(name, 1.3, _exec_over_limit(results, limit), "x"))
    for name, size in (("20 MB", "20m"), ("1 GB", "1g")):
        rows.append(_stall(results, f"added p99 stall / asyncio's, {name}", size))
    for name, key in (
        ("application's CPU per start, Fork.new", "afork-new/1"),
        ("(16 in flight)", "afork-new/16"),
    ):
        rows.append(at_most(name, 50, values_of(results, key, cpu), " us"))
    slowest = _slowest_fault(results)
    row = at_most("slowest error after a fault", 1000, slowest, " ms")
    if slowest and _faults_failed(results):  # see the table for which
        row["reached"] = False
    return [*rows, row]
