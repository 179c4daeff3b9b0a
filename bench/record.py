"""The record of one part of the benchmark: build/bench-<name>.json.

Its form is the same for each part::

    about     what the numbers depend on: about() and the part's options
    summary   {key: {"label": text, numbers with their unit in the name}}, medians
    targets   the rows of targets.at_least() and at_most(): what must be reached
    samples   what each round measured

picture.py and readme.py read nothing else. A row of the summary is drawn if it has
these columns; rows of one label are one line::

    template_mb and rate           starts per second, template of so many MB
    workers and pss_mb, private_mb memory per worker, of so many (in memory)
    app_mb and rate, key app-...   starts per second, application of so many MB
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import sysconfig
from pathlib import Path
from typing import Any

BUILD = Path(__file__).resolve().parent.parent / "build"

#: The parts, in the order in which ``make bench`` runs them.
PARTS = ("start", "calls", "memory", "latency", "scale")


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return "unknown"


def about(seed: int | None = None, **options: Any) -> dict[str, Any]:
    """What the numbers depend on, as far as it can be read, before measuring.

    Args:
        seed: Of the part's random generator, None if nothing in it is random.
        options: The part's own: rounds, seconds, ...
    """
    model = [
        line.partition(":")[2].strip()
        for line in _read("/proc/cpuinfo").splitlines()
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
        "thp": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "python": platform.python_version(),
        "python_executable": sys.executable,
        "python_build": sysconfig.get_config_var("CONFIG_ARGS") or "",
        "python_compiler": platform.python_compiler(),
        "load_before": os.getloadavg(),
        "seed": seed,
        **options,
    }


def path(name: str) -> Path:
    """Where the part of this name writes, and where others read it."""
    return BUILD / f"bench-{name}.json"


def document(
    about: dict[str, Any],
    summary: dict[str, Any],
    targets: list[dict[str, Any]],
    samples: dict[str, Any],
) -> dict[str, Any]:
    """The four of them as what is written; the load afterwards is added."""
    return {
        "about": {**about, "load_after": os.getloadavg()},
        "summary": summary,
        "targets": targets,
        "samples": samples,
    }


def write(target: Path, found: dict[str, Any]) -> None:
    """Write a document(), and print where. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{target}")


def read(name: str) -> dict[str, Any] | None:
    """What a part has written, or None if it was not run. Raises ValueError."""
    try:
        found: dict[str, Any] = json.loads(path(name).read_text())
    except FileNotFoundError:
        return None
    return found


def to_show(about: str, target: Path) -> tuple[Path, dict[str, dict[str, Any]]]:
    """What picture.py and readme.py show, and into which file.

    Args:
        about: What the program does.
        target: The file, if ``--file`` does not name another one.

    Returns:
        The file, and the documents of the parts that were run.

    Raises:
        SystemExit: There is none, or a trial run (``--quick``) would go to ``target``.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--file", type=Path, default=target)
    args = parser.parse_args()
    documents = {name: found for name in PARTS if (found := read(name))}
    if not documents:
        sys.exit(f"{parser.prog}: nothing was measured (make bench)")
    quick = [name for name, one in documents.items() if one["about"].get("quick")]
    if quick and args.file == target:
        names = " ".join(quick)
        sys.exit(f"{parser.prog}: a trial run ({names}) goes to another --file only")
    return args.file, documents
