#!/usr/bin/env python3
"""Write the tables of README.rst from the records in build/ (see record.py).

Only what stands between the two comments is touched. What was not measured is named,
not filled in; a trial run (``--quick``) is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
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
    ("afork-new-uvloop", "the same under uvloop"),
    ("afork-new@1g", "``afork.Fork.new()``, application of 1 GB"),
    ("perl-new", "Perl's ``AnyEvent::Fork->new``"),
    ("forkserver", "``multiprocessing`` forkserver, preloaded"),
    ("billiard", "billiard, forkserver"),
    ("pebble", "pebble, a process for each call"),
    ("afork-exec", "``afork.Fork.new_exec()``"),
    ("spawn", "``multiprocessing`` spawn"),
    ("loky", "loky, a pool of one"),
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


def of_limit(rows: Rows, key: str, column: str, form: str = "{:,.0f}") -> str:
    """With the ratio to the limit in C, in parentheses."""
    found = cell(rows, key, column, form)
    ratio = rows.get(key, {}).get("of_limit")
    return found if not found or ratio is None else f"{found} ({digits(ratio)}x)"


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
            "starts per second (of the limit in C)",
            "one at a time",
            "16 in flight",
            "application's CPU",
        ),
        named(
            WORKERS,
            lambda key: of_limit(rows, f"{key}/1", "rate"),
            lambda key: of_limit(rows, f"{key}/16", "rate"),
            cpu,
        ),
        "46 18 18 18",
    )


def programs(rows: Rows) -> str:
    return list_table(
        ("programs per second (``/bin/true``)", "20 MB", "1 GB", "CPU at 20 MB"),
        named(
            PROGRAMS,
            lambda key: of_limit(rows, f"{key}@20m", "rate"),
            lambda key: of_limit(rows, f"{key}@1g", "rate"),
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


def first_byte(rows: Rows, prefix: str, title: str, limit: str) -> str:
    """One at a time, with a pause between, and without."""
    found = [
        (
            rows[key]["label"],
            *(cell(rows, key, name, "{:,.0f} us") for name in ("p50_us", "p99_us")),
            cell(rows, key, "of_limit", "{:.1f}x"),
            cell(rows, key, "brisk_us", "{:,.0f} us"),
        )
        for key in rows
        if key.startswith(prefix) and rows[key].get("p50_us")
    ]
    header = (title, "p50", "p99", f"p50 of {limit}", "p50, no pause")
    return list_table(header, found, "46 13 13 14 14")


def applications(rows: Rows) -> str:
    """Of several sizes."""
    sizes = {20: "20 MB", 200: "200 MB", 1024: "1 GB", 4096: "4 GB"}
    found = [
        (
            rows[key]["label"],
            *(of_limit(rows, f"{key.partition('@')[0]}@{mb}m", "rate") for mb in sizes),
        )
        for key in rows
        if key.startswith("app-") and key.endswith("@20m")
    ]
    header = ("starts per second (of C's), application of", *sizes.values())
    return list_table(header, found, "36 16 16 16 16")


def memory(rows: Rows) -> str:
    """Of a worker among 100."""
    found = [
        (
            row["label"],
            of_limit(rows, key, "pss_mb", "{:.2f} MB"),
            f"{row['private_mb']:.2f} MB",
        )
        for key, row in rows.items()
        if row.get("workers") == 100
    ]
    header = ("an idle worker among 100 (of C's)", "proportional (PSS)", "private")
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
        rows = documents["latency"]["summary"]
        title = "from the request to the first byte of user code"
        blocks += [
            first_byte(rows, "one-", title, "C fork"),
            first_byte(rows, "ready-", f"{title}, a process waits", "C"),
        ]
    if "scale" in documents:
        blocks.append(applications(documents["scale"]["summary"]))
    if "memory" in documents:
        blocks.append(memory(documents["memory"]["summary"]))
    if "calls" in documents:
        found = documents["calls"]
        blocks += [calls(found["summary"]), missed_calls(found)]
    return "\n".join(blocks)


def main() -> int:
    file, documents = record.to_show("Write the tables of README.rst.", README)
    before, begin, rest = file.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        print(f"readme.py: {file} lacks the two comments", file=sys.stderr)
        return 1
    file.write_text(f"{before}{begin}\n{text(documents)}\n{end}{after}")
    print(file)
    return 0 if len(documents) == len(record.PARTS) else 1


if __name__ == "__main__":
    sys.exit(main())
