#!/usr/bin/env python3
"""The first benchmark: how fast workers and programs start.

Ours beside its peers and beside limit programs in C.

Every contender runs once per round, in a fresh process of its own, and the rounds
alternate (A B C A B C ...), so that a machine that slows down slows all of them.
Printed are medians over the rounds. See ``--help``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import table
import targets
from contenders import HERE, Contender, Job, contenders
from meter import Sample, Unavailable

BUILD = HERE.parent / "build"
TIMEOUT = 60.0  # seconds for one contender in one round, on top of its measured time
SETTLE = 0.05  # seconds between contenders: the last one's processes are ending


def build_limits(folder: Path) -> Path | None:
    """Compile the limit programs, static where the C library allows it.

    None without a compiler.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    source, target = HERE / "limits.c", folder / "limits"
    if target.exists() and target.stat().st_mtime > source.stat().st_mtime:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        compiler,
        "-std=c11",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Wshadow",
        "-Wconversion",
        "-o",
        str(target),
    ]
    if (
        subprocess.run(
            [*command, "-static", str(source)], check=False, stderr=subprocess.DEVNULL
        ).returncode
        != 0
    ):
        print(
            "start.py: no static C library: the limit programs are dynamic",
            file=sys.stderr,
        )
        subprocess.run([*command, str(source)], check=True)
    return target


def environment() -> dict[str, str]:
    """The folder goes on the path by name.

    Multiprocessing's forkserver of 3.11 preloads from nowhere else.
    """
    path = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Workers that import the target read its cached bytecode, as they would anywhere.
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONDONTWRITEBYTECODE": "",
    }


def run_one(contender: Contender, job: Job) -> Sample:
    """One contender, one round.

    Output goes to files: a process left behind must not keep us waiting at a pipe.
    """
    try:
        command = contender.command(job)
    except Unavailable as reason:
        return {"skip": str(reason)}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command,
            cwd=HERE,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )
        try:
            status: int | str = process.wait(TIMEOUT + job.seconds * 5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = "timeout"
        out.seek(0)
        err.seek(0)
        lines = out.read().decode(errors="replace").splitlines()
        said = err.read().decode(errors="replace").strip()
    sample: Sample = {}
    for line in lines:
        try:
            sample = json.loads(line)
        except ValueError:
            continue
    if not sample or (status != 0 and "skip" not in sample):
        last = said.splitlines()[-1] if said else "no output"
        return {"failed": f"status {status}: {last}", "stderr": said[-4000:]}
    if said:
        sample["stderr"] = said[-4000:]
    return sample


def machine() -> dict[str, Any]:
    """What the numbers depend on, as far as it can be read."""

    def read(path: str) -> str:
        try:
            return Path(path).read_text().strip()
        except OSError:
            return "unknown"

    model = [
        line.partition(":")[2].strip()
        for line in read("/proc/cpuinfo").splitlines()
        if "model name" in line
    ]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "cpu": model[0] if model else "unknown",
        "cpus": len(os.sched_getaffinity(0)),
        "memory_mb": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "thp": read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "python": platform.python_version(),
        "python_executable": sys.executable,
        "python_build": sysconfig.get_config_var("CONFIG_ARGS") or "",
        "python_compiler": platform.python_compiler(),
        "load_before": os.getloadavg(),
    }


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
        "--json", type=Path, default=BUILD / "bench-start.json", metavar="FILE"
    )
    args = parser.parse_args()
    args.rounds = args.rounds or (2 if args.quick else 5)
    args.seconds = args.seconds or (0.2 if args.quick else 0.5)
    return args


def select(texts: list[str]) -> list[Contender]:
    """The contenders of these keys; a text that is no key selects all that have it."""
    known = contenders()
    keys = {one.key for one in known}
    return [
        one
        for one in known
        if not texts
        or any(
            text in one.key if text not in keys else text == one.key for text in texts
        )
    ]


def main() -> int:
    args = options()
    chosen = select(args.only)
    if args.list:
        print("\n".join(one.key for one in chosen))
        return 0
    if not chosen:
        print("start.py: --only matches nothing (see --list)", file=sys.stderr)
        return 2
    job = Job(build_limits(BUILD / "bench"), args.seconds, args.count)
    about = machine()
    results: dict[str, list[Sample]] = {one.key: [] for one in chosen}
    begin = time.monotonic()
    for number in range(args.rounds):
        for contender in chosen:
            before = results[contender.key]
            if before and "skip" in before[-1]:
                continue
            if sys.stderr.isatty():
                print(
                    f"\r\033[Kround {number + 1}/{args.rounds}  {contender.key}",
                    end="",
                    file=sys.stderr,
                    flush=True,
                )
            before.append(run_one(contender, job))
            time.sleep(SETTLE)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    for samples in results.values():
        for sample in samples:
            about.setdefault("versions", {}).update(sample.get("versions", {}))
    about["load_after"] = os.getloadavg()
    about["took_s"] = round(time.monotonic() - begin, 1)
    about.update(
        rounds=args.rounds, seconds=args.seconds, count=args.count, quick=args.quick
    )

    summary = table.summary(chosen, results)
    aims = targets.targets(results)
    print(table.render(about, summary, aims))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    document = {"about": about, "summary": summary, "targets": aims, "samples": results}
    args.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{args.json}")
    return (
        1
        if any("failed" in sample for samples in results.values() for sample in samples)
        else 0
    )


if __name__ == "__main__":
    sys.exit(main())
