#!/usr/bin/env python3
"""Write the tables of README.rst from the records in build/ (see record.py).

Only what stands between the two comments is touched. What was not measured is named,
not filled in; a trial run (``--quick``) is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import record

Rows = dict[str, dict[str, Any]]
Documents = dict[str, dict[str, Any]]

README = record.BUILD.parent / "README.rst"
BEGIN = ".. The numbers from here on are written by bench/readme.py.\n"
END = ".. The numbers end here.\n"

WORKERS = (
    ("c-fork", "C: socketpair and fork, static, 5 MB"),
    ("c-image", "C: the same, in the memory of our template"),
    ("os-fork", "``os.fork`` of an empty Python"),
    ("afork-new", "``afork.Fork.new()``"),
    ("afork-new@1g", "``afork.Fork.new()``, application of 1 GB"),
    ("perl-new", "Perl's ``AnyEvent::Fork->new``"),
    ("forkserver", "``multiprocessing`` forkserver, preloaded"),
    ("afork-exec", "``afork.Fork.new_exec()``"),
    ("spawn", "``multiprocessing`` spawn"),
)
PROGRAMS = (
    ("c-spawn", "C: ``posix_spawn``"),
    ("run", "``subprocess.run``"),
    ("asyncio", "``asyncio.create_subprocess_exec``"),
    ("uvloop", "the same under uvloop"),
    ("afork-program", "``afork.create_subprocess_exec``"),
    ("afork-program-uvloop", "the same under uvloop"),
)
CALLS = (
    ("limit", "C: 64 bytes through a socket pair"),
    ("rpc", "``await rpc(x)``"),
    ("rpc-uvloop", "the same under uvloop"),
    ("pool", "``await pool.call(f, x)``"),
    ("pool-uvloop", "the same under uvloop"),
    ("execnet", "execnet"),
    ("anyio", "anyio.to_process"),
    ("mp-pool", "``multiprocessing.Pool``"),
    ("billiard", "billiard"),
    ("pebble", "pebble"),
    ("trio", "trio-parallel"),
    ("ppe", "``ProcessPoolExecutor``"),
    ("loky", "loky"),
)


def list_table(
    header: Iterable[str], rows: Iterable[tuple[str, ...]], widths: str
) -> str:
    lines = [".. list-table::", "   :header-rows: 1", f"   :widths: {widths}", ""]
    for row in [tuple(header), *rows]:
        lines += [
            f"   {'* -' if at == 0 else '  -'} {cell}".rstrip()
            for at, cell in enumerate(row)
        ]
    return "\n".join(lines) + "\n"


def cell(rows: Rows, key: str, column: str, form: str = "{:,.0f}") -> str:
    """Empty if it was not measured."""
    value = rows.get(key, {}).get(column)
    return "" if value is None else form.format(value)


def named(names: Iterable[tuple[str, str]], *columns: Callable[[str], str]) -> Any:
    """A row for each name that has one number at least."""
    found = [(label, *(one(key) for one in columns)) for key, label in names]
    return [row for row in found if any(row[1:])]


def workers(rows: Rows) -> str:
    def cpu(key: str) -> str:
        # The limits are processes whose CPU time is not an application's.
        own = key.startswith(("c-", "os-"))
        return "" if own else cell(rows, f"{key}/1", "cpu_us", "{:,.0f} us")

    return list_table(
        (
            "starts per second",
            "one at a time",
            "16 in flight",
            "application's CPU",
        ),
        named(
            WORKERS,
            lambda key: cell(rows, f"{key}/1", "rate"),
            lambda key: cell(rows, f"{key}/16", "rate"),
            cpu,
        ),
        "46 18 18 18",
    )


def programs(rows: Rows) -> str:
    return list_table(
        ("programs per second (``/bin/true``)", "20 MB", "1 GB", "CPU at 20 MB"),
        named(
            PROGRAMS,
            lambda key: cell(rows, f"{key}@20m", "rate"),
            lambda key: cell(rows, f"{key}@1g", "rate"),
            lambda key: cell(rows, f"{key}@20m", "cpu_us", "{:,.0f} us"),
        ),
        "46 18 18 18",
    )


def calls(rows: Rows) -> str:
    def free(key: str) -> str:
        found = cell(rows, f"one/{key}", "us", "{:,.0f} us")
        both = cell(rows, f"one/{key}-free", "us", "{:,.0f} us")
        return f"{found} ({both} placed by the kernel)" if both else found

    return list_table(
        ("calls: an integer, and back", "one at a time", "64 in flight, one process"),
        named(CALLS, free, lambda key: cell(rows, f"many/{key}", "rate", "{:,.0f}/s")),
        "46 27 27",
    )


def first_byte(rows: Rows) -> str:
    """One at a time."""
    found = [
        (row["label"], f"{row['p50_us']:,.0f} us", f"{row['p99_us']:,.0f} us")
        for key, row in rows.items()
        if key.startswith("one-") and row.get("p50_us")
    ]
    header = ("from the request to the first byte of user code", "p50", "p99")
    return list_table(header, found, "46 27 27")


def memory(rows: Rows) -> str:
    """Of a worker among 100."""
    found = [
        (row["label"], f"{row['pss_mb']:.2f} MB", f"{row['private_mb']:.2f} MB")
        for row in rows.values()
        if row.get("workers") == 100
    ]
    header = ("an idle worker among 100", "proportional (PSS)", "private")
    return list_table(header, found, "46 27 27")


def digits(value: float) -> str:
    """Three of them: 0.123, 1.23, 12.3, 123, 1,234."""
    places = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{3 if 0 < abs(value) < 0.1 else places}f}"


def measured(row: dict[str, Any]) -> str:
    """The median, with the lowest and the highest round."""
    unit = row["unit"]
    if row["low"] in (None, row["high"]):
        return f"{digits(row['value'])}{unit}"
    between = f"{digits(row['low'])} to {digits(row['high'])}"
    return f"{digits(row['value'])}{unit} ({between})"


def counted(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets; rows in parentheses only say more about the one above."""
    return [one for one in document["targets"] if not one["name"].startswith("(")]


def targets(documents: Documents) -> str:
    rows = []
    for name, document in documents.items():
        if name == "calls":  # many, and printed by calls.py: see missed_calls()
            continue
        for one in counted(document):
            want = one["want"].replace(">=", "≥").replace("<=", "≤")
            if one["value"] is None:
                rows.append((one["name"], want, "not measured", ""))
                continue
            verdict = {True: "reached", False: "**missed**", None: ""}
            rows.append((one["name"], want, measured(one), verdict[one["reached"]]))
    widths = "46 12 28 14"
    return list_table(("target", "wanted", "median (rounds)", ""), rows, widths)


def missed_calls(document: dict[str, Any]) -> str:
    every = counted(document)
    missed = [one for one in every if one["reached"] is False]
    text = f"Of {len(every)} targets for calls, {len(every) - len(missed)} are reached"
    absent = sum(one["value"] is None for one in every)
    if absent:
        text = text.replace("reached", f"reached or ({absent}) not measured")
    if not missed:
        return f"{text}.\n"
    listed = "; ".join(
        f"{one['name']} {measured(one)}, wanted {one['want']}" for one in missed
    )
    return f"{text}. Missed: {listed}.\n"


def machine(documents: Documents) -> str:
    every = [one["about"] for one in documents.values()]
    first = every[0]
    pythons = " and ".join(sorted({one["python"] for one in every}))
    rounds = sorted({one["rounds"] for one in every if "rounds" in one})
    dates = sorted({one["date"][:10] for one in every})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    how_many = " to ".join(str(n) for n in dict.fromkeys((rounds[0], rounds[-1])))
    return (
        f"{first['cpus']} x {first['cpu']}, {first['memory_mb'] / 1024:.0f} GiB, "
        f"Linux {first['kernel']}, {first['libc']}, CPython {pythons}, {when}. "
        f"Medians of {how_many} alternating rounds.\n"
    )


def text(documents: Documents) -> str:
    blocks = [machine(documents)]
    missing = [name for name in record.PARTS if name not in documents]
    if missing:
        names = " ".join(missing)
        blocks.append(f'Not measured: ``make bench BENCH="{names}"``.\n')
    blocks.append(targets(documents))
    if "start" in documents:
        rows = documents["start"]["summary"]
        blocks += [workers(rows), programs(rows)]
    if "latency" in documents:
        blocks.append(first_byte(documents["latency"]["summary"]))
    if "memory" in documents:
        blocks.append(memory(documents["memory"]["summary"]))
    if "calls" in documents:
        found = documents["calls"]
        blocks += [calls(found["summary"]), missed_calls(found)]
    return "\n".join(blocks)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the tables of README.rst.")
    parser.add_argument("--file", type=Path, default=README, metavar="README")
    args = parser.parse_args()
    documents = {name: found for name in record.PARTS if (found := record.read(name))}
    if not documents:
        print("readme.py: nothing was measured (make bench)", file=sys.stderr)
        return 1
    quick = [name for name, one in documents.items() if one["about"].get("quick")]
    if quick:
        print(f"readme.py: not from a trial run: {' '.join(quick)}", file=sys.stderr)
        return 1
    before, begin, rest = args.file.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        print(f"readme.py: {args.file} lacks the two comments", file=sys.stderr)
        return 1
    args.file.write_text(f"{before}{begin}\n{text(documents)}\n{end}{after}")
    print(args.file)
    return 0 if len(documents) == len(record.PARTS) else 1


if __name__ == "__main__":
    sys.exit(main())
