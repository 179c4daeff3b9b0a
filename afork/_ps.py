"""``python -m afork ps`` and ``tree``: processes of afork, seen in procfs.

No file of our own, and nothing is asked of the processes: what may not be read
is shown as a dash.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field

from ._stats import read_age, read_memory

#: How processes made by afork call themselves unless they were told otherwise.
_TITLE = "afork: "
_COLUMNS = ("pid", "ppid", "role", "age", "pss", "private", "huge", "threads", "title")

_TEXTS = ("role", "process", "title")


@dataclass
class Found:
    """One process."""

    pid: int
    ppid: int
    threads: int
    title: str
    role: str = ""
    children: list[Found] = field(default_factory=list)

    def row(self) -> list[str]:
        memory = read_memory(self.pid)
        try:
            age = _duration(read_age(self.pid))
        except (OSError, ValueError, IndexError):
            age = "-"
        sizes = [_size(memory.get(k)) for k in ("pss", "private", "huge_pages")]
        return [
            *(str(self.pid), str(self.ppid), self.role, age),
            *(*sizes, str(self.threads), self.title),
        ]


def _size(n: int | None) -> str:
    return "-" if n is None else f"{n / (1 << 20):.1f}M"


def _duration(seconds: float) -> str:
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours:02}h"
    return f"{hours}:{minutes:02}:{whole % 60:02}"


def _read(pid: int) -> Found | None:
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        with open(f"/proc/{pid}/cmdline", "rb") as raw:
            words = raw.read().rstrip(b"\0").replace(b"\0", b" ")
    except OSError:
        return None  # it has just ended
    title = "".join(
        c if c.isprintable() else "?" for c in words.decode("utf-8", "replace")
    )
    return Found(pid, int(fields[1]), int(fields[17]), title)


def _loads_us(pid: int) -> bool:
    """Whether a process has loaded our extension, if we may know."""
    try:
        with open(f"/proc/{pid}/maps", errors="replace") as file:
            return any("/_afork." in line for line in file)
    except OSError:
        return False


def find() -> dict[int, Found]:
    """All processes of afork by pid, and the applications they belong to."""
    names = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    known = {p.pid: p for p in map(_read, names) if p is not None}
    found: dict[int, Found] = {}
    for process in known.values():
        if process.title.startswith(_TITLE):
            process.title = process.title[len(_TITLE) :]
            process.role = process.title.partition(" ")[0]
            found[process.pid] = process
    # What they have started, programs among it, and has another title.
    grown = True
    while grown:
        grown = False
        for process in known.values():
            if process.pid not in found and process.ppid in found:
                process.role = "worker" if _loads_us(process.pid) else "program"
                found[process.pid] = process
                grown = True
    for process in list(found.values()):
        owner = known.get(process.ppid)
        if owner is not None and owner.pid not in found and _loads_us(owner.pid):
            owner.role = "application"
            found[owner.pid] = owner
    for process in found.values():
        if process.ppid in found:
            found[process.ppid].children.append(process)
    return found


def _table(rows: list[list[str]], heads: list[str]) -> int:
    """Print it; the exit status. Whoever reads it may stop early (``| head``)."""
    try:
        _print_table(rows, heads)
        sys.stdout.flush()
    except BrokenPipeError:
        # Or the interpreter would complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _print_table(rows: list[list[str]], heads: list[str]) -> None:
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    for row in (heads, *rows):
        cells = [
            cell.ljust(width) if head in _TEXTS else cell.rjust(width)
            for cell, width, head in zip(row, widths, heads, strict=True)
        ]
        print("  ".join(cells).rstrip())


def ps() -> int:
    """A line for each process, oldest number first."""
    found = [p for p in find().values() if p.role != "application"]
    rows = [p.row() for p in sorted(found, key=lambda p: p.pid)]
    return _table(rows, [*_COLUMNS])


def tree() -> int:
    """The same, below their parents."""
    found = find()
    rows: list[list[str]] = []

    def add(process: Found, depth: int) -> None:
        pid, _ppid, role, *rest, title = process.row()
        name = title if title.startswith(role) else f"{role} {title}"
        rows.append([f"{'  ' * depth}{pid} {name[:60]}", *rest])
        for child in sorted(process.children, key=lambda p: p.pid):
            add(child, depth + 1)

    for process in sorted(found.values(), key=lambda p: p.pid):
        if process.ppid not in found:
            add(process, 0)
    return _table(rows, ["process", *_COLUMNS[3:-1]])
