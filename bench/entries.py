"""What latency.py and scale.py have in common: commands, medians, table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import table
import targets
from contenders import Contender, Job
from meter import Sample, Unavailable
from stall import percentile

Row = dict[str, Any]
Results = dict[str, list[Sample]]
PERCENTILES = {"p50_us": 50, "p90_us": 90, "p99_us": 99, "max_us": 100}
#: Of a sample, and in no column of the table.
INTERNAL = {"n", "seconds", "us", "app_mb", "workers_pids"}


@dataclass(frozen=True)
class Entry(Contender):
    """A contender that is compared with the one of the key ``limit``.

    ``columns`` go into its row of the summary as they are. ``size`` is that of a burst.
    """

    limit: str = ""
    columns: Row = field(default_factory=dict)
    size: int = 0


def first_command(way: str, pattern: str, **options: Any) -> Callable[[Job], list[str]]:
    """first.py; options as of its command line, without the dashes."""

    def command(job: Job) -> list[str]:
        given = {"seconds": job.seconds, "count": job.count, **options}
        return [
            sys.executable,
            "-c",
            "import first; first.main()",
            way,
            pattern,
            *(str(x) for name, value in given.items() for x in (f"--{name}", value)),
        ]

    return command


def c_command(pattern: str, **options: Any) -> Callable[[Job], list[str]]:
    """limits_first.c; ``gap`` in seconds, as first.py has it."""

    def command(job: Job) -> list[str]:
        if job.limits is None:
            raise Unavailable("no C compiler")
        given = {"seconds": job.seconds, "count": job.count, **options}
        given["gap"] = round(given.get("gap", 0) * 1e6)
        return [
            str(job.limits.with_name("limits_first")),
            pattern,
            *(str(x) for name, value in given.items() for x in (f"--{name}", value)),
        ]

    return command


def p50(sample: Sample) -> float | None:
    return percentile(sample["us"], 50) if sample.get("us") else None


def by_round(
    results: Results, over: str, under: str, value: Callable[[Sample], float | None]
) -> list[float]:
    """``over``'s value by ``under``'s, round by round."""
    pairs = zip(
        targets.by_round(results, over, value),
        targets.by_round(results, under, value),
        strict=False,
    )
    return [a / b for a, b in pairs if a and b]


def _bursts(samples: Iterable[Sample], size: int) -> Row:
    """When the first, the middle and the last of a burst had sent its byte."""
    found = [
        sorted(sample["us"][at : at + size])
        for sample in samples
        for at in range(0, len(sample.get("us", [])), size)
    ]
    return {
        "first_us": median(one[0] for one in found),
        "median_us": median(one[len(one) // 2] for one in found),
        "last_us": median(one[-1] for one in found),
    }


def _row(one: Contender, results: Results) -> Row:
    assert isinstance(one, Entry)
    samples = results[one.key]
    row: Row = {"label": one.label, "scenario": one.scenario, **one.columns}
    good = [sample for sample in samples if targets.rate(sample)]
    for name in ("failed", "skip"):
        reasons = [str(sample[name]) for sample in samples if name in sample]
        if reasons:
            row[name] = reasons[0]
    if not good:
        return row
    us = [value for sample in good for value in sample.get("us", [])]
    if one.size:
        row.update(_bursts(good, one.size))
    elif us:
        row.update({name: percentile(us, p) for name, p in PERCENTILES.items()})
    row["rate"] = median(targets.rate(sample) or 0 for sample in good)
    for name, value in good[0].items():
        if name not in INTERNAL and isinstance(value, (int, float)):
            row[name] = median(sample[name] for sample in good if name in sample)
        elif name == "ticker":
            row["stall_p99_ms"] = median(sample[name]["p99_ms"] for sample in good)
            row["stall_max_ms"] = max(sample[name]["max_ms"] for sample in good)
    if one.limit in results:
        measure = targets.rate if "rate" in one.columns.get("by", "rate") else p50
        found = by_round(results, one.key, one.limit, measure)
        if found:
            row["of_limit"] = median(found)
    return row


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    form = ".2f" if name in ("of_limit", "hits") or name.endswith("_ms") else ".0f"
    return format(value, form)


def _lines(rows: list[Row]) -> list[str]:
    hidden = {"label", "scenario", "failed", "skip", "by"}
    names = list(dict.fromkeys(n for row in rows for n in row if n not in hidden))
    listed = []
    for row in rows:
        if "rate" in row:
            listed.append([row["label"], *(_cell(n, row.get(n)) for n in names)])
        if "rate" not in row or "failed" in row:
            listed.append([f"  {row['label']}", table._remark(row)])
    titles = [name.replace("_", " ").replace("rate", "1/s") for name in names]
    return table.columns(["", *titles], listed)


def summary(chosen: list[Contender], results: Results) -> dict[str, Row]:
    return {one.key: _row(one, results) for one in chosen}


def render(rows: dict[str, Row], _: Results) -> list[str]:
    """A table for each scenario."""
    return [
        "\n".join(
            [scenario, *_lines([r for r in rows.values() if r["scenario"] == scenario])]
        )
        for scenario in dict.fromkeys(row["scenario"] for row in rows.values())
    ]
