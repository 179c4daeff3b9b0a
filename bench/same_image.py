"""The limit program `fork`, in the image of an idle default template.

What a C loop reaches that forks the same mappings and the same touched pages as ours,
and whose children do nothing: ``python same_image.py LIMITS INFLIGHT SECONDS COUNT``.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from pathlib import Path

import afork


async def template() -> int | None:
    """The process id of a default template that has forked; it stays."""
    (await afork.Fork.new().run("builtins.id")).close()
    return (await afork.Fork.default().ready()).pid


def main() -> int:
    limits, inflight, seconds, count = sys.argv[1:]
    with tempfile.NamedTemporaryFile() as smaps:
        smaps.write(Path(f"/proc/{asyncio.run(template())}/smaps").read_bytes())
        smaps.flush()
        options = ["--like", smaps.name, "--inflight", inflight]
        options += ["--seconds", seconds, "--count", count]
        return subprocess.run([limits, "fork", *options], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
