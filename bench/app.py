"""One application process of the benchmark.

One contender, one round, a given amount of memory.

Started as ``python -c "import app; app.main()" ...``: with ``-c`` there is no main file
that multiprocessing would run again in every child, which makes it many times slower.
One row runs this file as a script, to show that: most applications have a main file.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import mmap
import os
from pathlib import Path

from meter import Goal, Sample, Unavailable

PAGE = mmap.PAGESIZE


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def grow(mb: int) -> mmap.mmap | None:
    """Touch memory until the process has ``mb`` resident, in ordinary pages.

    Those are what fork pays for.
    """
    missing = (mb << 20) - rss()
    if missing <= 0:
        return None
    ballast = mmap.mmap(-1, missing, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        ballast.madvise(mmap.MADV_NOHUGEPAGE)
    pages = range(0, missing, PAGE)
    ballast[:: pages.step] = b"\1" * len(pages)
    return ballast


def run(function: str, goal: Goal, mb: int) -> Sample:
    function, *words = function.split(":")
    module, _, name = function.partition(".")
    contender = getattr(importlib.import_module(module), name)
    ballast = grow(mb)
    resident = rss() >> 20
    try:
        sample: Sample = contender(*words, goal)
    except Unavailable as reason:
        return {"skip": str(reason)}
    del ballast  # alive until here
    return {**sample, "app_mb": resident}


def main() -> None:
    parser = argparse.ArgumentParser(prog="app")
    parser.add_argument("function", help="module.function:argument:..., of this folder")
    parser.add_argument("--mb", type=int, default=0)
    parser.add_argument("--inflight", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--count", type=int, default=0)
    args = parser.parse_args()
    sample = run(args.function, Goal(args.seconds, args.count, args.inflight), args.mb)
    # One write: whatever a child still has to say comes before or after it.
    os.write(1, json.dumps(sample).encode() + b"\n")


if __name__ == "__main__":
    main()
