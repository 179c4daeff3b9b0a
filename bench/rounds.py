"""Contenders in alternating rounds, each in a fresh process of its own.

A B C A B C ...: a machine that slows down slows all of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from contenders import HERE, Contender, Job
from meter import Sample, Unavailable

TIMEOUT = 60.0  # seconds for one contender in one round, on top of its measured time
SETTLE = 0.05  # seconds between contenders: the last one's processes are ending


def build_limits(folder: Path, name: str = "limits") -> Path | None:
    """Compile the limit programs, static where the C library allows it.

    None without a compiler.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    source, target = HERE / f"{name}.c", folder / name
    newest = max(one.stat().st_mtime for one in (source, HERE / "limits.h"))
    if target.exists() and target.stat().st_mtime > newest:
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
            "no static C library: the limit programs are dynamic",
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


def select(known: list[Contender], texts: list[str]) -> list[Contender]:
    """The contenders of these keys; a text that is no key selects all that have it."""
    keys = {one.key for one in known}
    return [
        one
        for one in known
        if not texts
        or any(
            text in one.key if text not in keys else text == one.key for text in texts
        )
    ]


def measure(chosen: list[Contender], job: Job, rounds: int) -> dict[str, list[Sample]]:
    """The samples of each, by round."""
    results: dict[str, list[Sample]] = {one.key: [] for one in chosen}
    for number in range(rounds):
        for contender in chosen:
            before = results[contender.key]
            if before and "skip" in before[-1]:
                continue
            if sys.stderr.isatty():
                print(
                    f"\r\033[Kround {number + 1}/{rounds}  {contender.key}",
                    end="",
                    file=sys.stderr,
                    flush=True,
                )
            before.append(run_one(contender, job))
            time.sleep(SETTLE)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return results


def versions(results: dict[str, list[Sample]]) -> dict[str, str]:
    """Of what the contenders have loaded."""
    found: dict[str, str] = {}
    for samples in results.values():
        for sample in samples:
            found.update(sample.get("versions", {}))
    return found


def failed(results: dict[str, list[Sample]]) -> bool:
    return any("failed" in one for samples in results.values() for one in samples)
