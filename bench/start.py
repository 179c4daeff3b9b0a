#!/usr/bin/env python3
"""The first part of the benchmark: how fast workers and programs start.

Ours beside its peers and beside limit programs in C, in alternating rounds. Printed
are medians over the rounds. See ``--help``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import record
import rounds
import table
import targets
from contenders import Job, contenders


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How fast workers and programs start.")
    parser.add_argument("--rounds", type=int, help="alternating rounds (5)")
    parser.add_argument(
        "--seconds", type=float, help="measured seconds per contender and round (0.5)"
    )
    parser.add_argument(
        "--count",
        type=int,
        default=0,
        help="starts per contender and round, instead of --seconds",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="contenders whose key has this",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="2 rounds of 0.2 s: does it run, not how fast is it",
    )
    parser.add_argument(
        "--list", action="store_true", help="print the contenders' keys"
    )
    parser.add_argument(
        "--json", type=Path, default=record.path("start"), metavar="FILE"
    )
    args = parser.parse_args()
    args.rounds = args.rounds or (2 if args.quick else 5)
    args.seconds = args.seconds or (0.2 if args.quick else 0.5)
    return args


def main() -> int:
    args = options()
    chosen = rounds.select(contenders(), args.only)
    if args.list:
        print("\n".join(one.key for one in chosen))
        return 0
    if not chosen:
        print("start.py: --only matches nothing (see --list)", file=sys.stderr)
        return 2
    job = Job(rounds.build_limits(record.BUILD / "bench"), args.seconds, args.count)
    about = record.about(
        rounds=args.rounds, seconds=args.seconds, count=args.count, quick=args.quick
    )
    begin = time.monotonic()
    results = rounds.measure(chosen, job, args.rounds)
    about["took_s"] = round(time.monotonic() - begin, 1)
    about["versions"] = rounds.versions(results)
    summary = table.summary(chosen, results)
    aims = targets.targets(results)
    print(table.render(about, summary, aims))
    record.write(args.json, record.document(about, summary, aims, results))
    return 1 if rounds.failed(results) else 0


if __name__ == "__main__":
    sys.exit(main())
