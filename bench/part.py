"""A part of the benchmark: contenders in rounds, a table, a record.

What start.py, calls.py, latency.py and scale.py have in common.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import record
import rounds
import table
from contenders import Contender, Job
from targets import Results, Row

LIMITS = ("limits_first", "tiny", "limits")

Summary = Callable[[list[Contender], Results], dict[str, Row]]
Render = Callable[[dict[str, Row], Results], list[str]]


def options(name: str, about: str, seconds: float) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about)
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="alternating rounds (3)")
    add("--seconds", type=float, default=seconds, help=f"of each round ({seconds:g})")
    add("--count", type=int, default=0, help="starts, instead of --seconds")
    add("--only", action="append", default=[], metavar="TEXT", help="keys with this")
    add("--quick", action="store_true", help="a round of 0.1 s: does it run")
    add("--list", action="store_true", help="print the contenders' keys")
    add("--json", type=Path, default=record.path(name), metavar="FILE")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = 1, 0.1
    return args


def main(
    name: str,
    about: str | None,
    contenders: list[Contender],
    summary: Summary,
    render: Render,
    aims: Callable[[Results], list[Row]],
    seconds: float = 0.5,
) -> int:
    """Run the part ``name``.

    Args:
        about: Its first line says what the part is.
        contenders: In the order of a round.
        summary: Gives a row for each of those that were chosen.
        render: The rows and samples as blocks of text.
        aims: What had to be reached.
        seconds: Of each contender in each round.

    Returns:
        1 if a contender failed, 2 if none was chosen, else 0.
    """
    args = options(name, (about or "").partition("\n")[0], seconds)
    chosen = rounds.select(contenders, args.only)
    if args.list:
        print("\n".join(one.key for one in chosen))
        return 0
    if not chosen:
        print(f"{name}.py: --only matches nothing (see --list)", file=sys.stderr)
        return 2
    folder = record.BUILD / "bench"
    *_, limits = (rounds.build_limits(folder, one) for one in LIMITS)
    told = record.about(
        rounds=args.rounds, seconds=args.seconds, count=args.count, quick=args.quick
    )
    begin = time.monotonic()
    results = rounds.measure(chosen, Job(limits, args.seconds, args.count), args.rounds)
    told["took_s"] = round(time.monotonic() - begin, 1)
    told["versions"] = rounds.versions(results)
    rows = summary(chosen, results)
    found = aims(results)
    if args.only:  # no list of what was not measured
        found = [row for row in found if row["value"] is not None]
    blocks = [table.head(told), *render(rows, results)]
    print("\n\n".join([*blocks, "\n".join(table.target_lines(found))]))
    record.write(args.json, record.document(told, rows, found, results))
    return 1 if rounds.failed(results) else 0
