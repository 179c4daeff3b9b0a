"""Helpers of the tests of memory: data of some size, and what became of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import afork

from .api_ask import ask

#: Python objects of about 50 MB, in arenas and in blocks of malloc's.
DATA = """
data = [
    {"id": i, "name": f"name {i}", "pair": (i * 1.5, str(i)), "list": list(range(i, i + 90))}
    for i in range(1000, 14_000)
]
"""

#: Reads all of it, and says what that has cost: kB of private memory.
SCAN = """
def scan():
    n = 0
    for item in data:
        for key in item:
            n += len(key)
        n += item["id"] + len(item["name"]) + len(item["pair"][1]) + len(item["list"])
    return n

def private():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(x.split()[1]) for x in file if x.startswith("Private_Dirty"))

def cost():
    scan()  # once in vain: the code is specialised where it is
    import gc
    before = private()
    result = scan()
    gc.collect()
    return private() - before, result
"""


async def stats(f: afork.Fork) -> dict[str, Any]:
    """What has been done to the memory of the template of a process."""
    found: dict[str, Any] = await ask(f, "__import__('afork._memory')._memory.stats()")
    return found


def huge_pages(pid: int) -> int:
    """Bytes of another process in huge pages, also in those of a file."""
    names = "AnonHugePages:", "ShmemPmdMapped:"
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(x.split()[1]) * 1024 for x in lines if x.startswith(names))
