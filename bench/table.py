"""From samples to medians over the rounds, and the table that is printed."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from contenders import FAULTS, LARGE, PROGRAMS, SMALL, WORKERS, Contender
from meter import Sample
from targets import Results, Row, rate, ratios

LIMIT = {
    WORKERS: {1: "c-fork/1", 16: "c-fork/16"},
    PROGRAMS: {SMALL: "c-spawn@20m", LARGE: "c-spawn@1g"},
}


def _faults(samples: Iterable[Sample]) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for sample in samples:
        for name, found in sample.get("faults", {}).items():
            row = rows.setdefault(name, {"ms": [], "errors": []})
            row["ms"] += found["ms"]
            row["errors"] += [
                error for error in found["errors"] if error not in row["errors"]
            ]
    return {
        name: {
            "n": len(row["ms"]),
            "median_ms": median(row["ms"]) if row["ms"] else None,
            "max_ms": max(row["ms"], default=None),
            "errors": row["errors"],
        }
        for name, row in rows.items()
    }


def _ticker(samples: list[Sample]) -> Row:
    found: Row = {}
    for phase in ("ticker_alone", "ticker"):
        rows = [sample[phase] for sample in samples if phase in sample]
        if rows:
            found[phase] = {name: median(row[name] for row in rows) for name in rows[0]}
            found[phase]["max_ms"] = max(
                row["max_ms"] for row in rows
            )  # the longest of all rounds
    return found


def _row(contender: Contender, samples: list[Sample], results: Results) -> Row:
    row: Row = {
        "label": contender.label,
        "scenario": contender.scenario,
        "inflight": contender.inflight,
        "app_mb": contender.app_mb or None,
        "rounds": len(samples),
    }
    said = [sample["stderr"] for sample in samples if sample.get("stderr")]
    if said:
        row["stderr"] = said[0].splitlines()[-1]
    reasons = [
        str(sample.get("failed", sample.get("skip")))
        for sample in samples
        if rate(sample) is None
    ]
    if reasons:
        row[
            "failed"
            if "failed" in samples[0] or len(reasons) < len(samples)
            else "skip"
        ] = reasons[0]
        row["missing_rounds"] = len(reasons)
    rates = [one for one in map(rate, samples) if one is not None]
    if not rates:
        return row
    if contender.scenario == FAULTS:
        return {**row, "faults": _faults(samples)}
    row.update(
        rate=median(rates), low=min(rates), high=max(rates), ms=1e3 / median(rates)
    )
    limit = LIMIT[contender.scenario][
        contender.inflight if contender.scenario == WORKERS else contender.app_mb
    ]
    of_limit = ratios(results, contender.key, limit)
    row["of_limit"] = median(of_limit) if of_limit else None
    for name in ("cpu_us", "first_ms"):
        values = [sample[name] for sample in samples if name in sample]
        row[name] = median(values) if values else None
    return {**row, **_ticker(samples)}


def summary(chosen: list[Contender], results: Results) -> dict[str, Row]:
    return {one.key: _row(one, results[one.key], results) for one in chosen}


def number(value: float | None, form: str = ".0f") -> str:
    return "-" if value is None else format(value, form)


def columns(header: list[str], rows: list[list[str]]) -> list[str]:
    """The first column to the left, the others to the right; a row of two is a name and
    a remark.
    """
    widths = [
        max(len(row[at]) for row in [header, *(r for r in rows if len(r) > 2)])
        for at in range(len(header))
    ]
    widths[0] = max([widths[0], *(len(row[0]) for row in rows)])
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += (
            row[1:]
            if len(row) == 2
            else [
                cell.rjust(width)
                for cell, width in zip(row[1:], widths[1:], strict=True)
            ]
        )
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _name(row: Row, program: bool) -> str:
    if program:
        return f"{row['label']}, {'1 GB' if row['app_mb'] == LARGE else '20 MB'}"
    return str(row["label"]) + (", 1 GB" if row["app_mb"] == LARGE else "")


def _remark(row: Row) -> str:
    return (
        f"failed: {row['failed']}"
        if "failed" in row
        else str(row.get("skip", "did not run"))
    )


def _starts(rows: Iterable[Row], program: bool) -> list[str]:
    header = [
        "",
        *([] if program else ["in flight"]),
        "starts/s",
        "low",
        "high",
        "ms",
        "of limit",
    ]
    header += ["app CPU us", "first ms"]
    if program:
        header += ["tick p99 ms", "alone", "added", "longest", "stalled"]
    lines = []
    for row in rows:
        if "rate" not in row:
            lines.append(
                [
                    _name(row, program) + ("" if program else f" x{row['inflight']}"),
                    _remark(row),
                ]
            )
            continue
        cells = [_name(row, program), *([] if program else [str(row["inflight"])])]
        cells += [
            number(row["rate"]),
            number(row["low"]),
            number(row["high"]),
            number(row["ms"], ".2f"),
        ]
        cells += [
            number(row["of_limit"], ".2f"),
            number(row["cpu_us"]),
            number(row["first_ms"], ".1f"),
        ]
        if program:
            busy, alone = row.get("ticker"), row.get("ticker_alone")
            if busy and alone:
                added = busy["p99_ms"] - alone["p99_ms"]
                cells += [
                    f"{value:.2f}"
                    for value in (
                        busy["p99_ms"],
                        alone["p99_ms"],
                        added,
                        busy["max_ms"],
                    )
                ]
                cells.append(f"{busy['stalled']:.0%}")
            else:
                cells += ["-"] * 5
        lines.append(cells)
        if "failed" in row:
            missing = f"{row['missing_rounds']} of {row['rounds']} rounds"
            lines.append(["  in " + missing, _remark(row)])
        elif "stderr" in row:
            lines.append(["  on stderr", row["stderr"]])
    return columns(header, lines)


def _fault_lines(row: Row) -> list[str]:
    if "faults" not in row:
        return [f"{row['label']}  {_remark(row)}"]
    lines = [
        [
            name,
            str(one["n"]),
            number(one["median_ms"], ".2f"),
            number(one["max_ms"], ".2f"),
            "; ".join(one["errors"]),
        ]
        for name, one in row["faults"].items()
    ]
    return columns(["", "n", "median ms", "max ms", "ended with"], lines)


def target_lines(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        verdict = {True: "reached", False: "NOT REACHED", None: ""}[row["reached"]]
        if row["value"] is None:
            verdict = "not measured"
        value = "-" if row["value"] is None else f"{row['value']:.2f}{row['unit']}"
        spread = (
            ""
            if row["low"] in (None, row["high"])
            else f"{row['low']:.2f} to {row['high']:.2f}"
        )
        if row.get("ours_ms") is not None and row["theirs_ms"] is not None:
            spread = f"{row['ours_ms']:.2f} of {row['theirs_ms']:.2f} ms"
        name = "   " + row["name"] if row["name"].startswith("(") else row["name"]
        lines.append([name, row["want"], value, spread, verdict])
    return columns(
        ["targets (median of the rounds' ratios)", "want", "is", "rounds", ""], lines
    )


def head(about: Row) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in about.get("versions", {}).items())
    length = f"{about['count']} starts" if about["count"] else f"{about['seconds']:g} s"
    return (
        f"{about['date']}  {about['cpus']} x {about['cpu']}, "
        f"{about['memory_mb']} MB, Linux {about['kernel']}, {about['libc']}\n"
        f"python {about['python']}" + (f", {versions}" if versions else "") + "\n"
        f"huge pages {about['thp']}, load {about['load_before'][0]:.2f} before, "
        f"medians of {about['rounds']} alternating rounds of {length}, "
        f"took {about['took_s']:.0f} s"
    )


def render(rows: dict[str, Row], _: Results) -> list[str]:
    blocks = []
    for scenario in (WORKERS, PROGRAMS):
        chosen = [row for row in rows.values() if row["scenario"] == scenario]
        if chosen:
            blocks.append([scenario, *_starts(chosen, scenario == PROGRAMS)])
    blocks += [
        [FAULTS, *_fault_lines(row)]
        for row in rows.values()
        if row["scenario"] == FAULTS
    ]
    return ["\n".join(block) for block in blocks]
