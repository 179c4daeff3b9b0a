"""What a process knows of itself, for `Fork.stats`; collected on request.

The answer travels as a string list of keys and values. A value is a letter and
text: ``i`` an int, ``f`` a float, ``t`` text, ``b`` a truth value, ``n`` None,
``l`` a string list. A dot in a key separates the levels of a dictionary.
"""

from __future__ import annotations

import os

from . import _afork, _child

TYPE_CHECKING = False  # see __init__.py
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

#: Lines of smaps_rollup that are told, in kB there and in bytes here.
_MEMORY = {
    "Rss": "rss",
    "Pss": "pss",
    "Private_Clean": "private",
    "Private_Dirty": "private",
    "AnonHugePages": "huge_pages",
    "ShmemPmdMapped": "huge_pages",
}


def read_memory(pid: int | str) -> dict[str, int]:
    """RSS, PSS, private bytes and huge pages of a process, from procfs.

    Empty without permission, or where the kernel does not tell.
    """
    found: dict[str, int] = {}
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                name, _, rest = line.partition(":")
                key = _MEMORY.get(name)
                if key is not None:
                    found[key] = found.get(key, 0) + int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return found


def read_age(pid: int | str) -> float:
    """Seconds since a process was made."""
    with open(f"/proc/{pid}/stat") as file:
        started = int(file.read().rpartition(")")[2].split()[19])
    with open("/proc/uptime") as file:
        up = float(file.read().split()[0])
    return max(0.0, up - started / os.sysconf("SC_CLK_TCK"))


def _threads() -> list[str]:
    names = []
    for task in sorted(os.listdir("/proc/self/task"), key=int)[1:]:
        try:
            with open(f"/proc/self/task/{task}/comm") as file:
                names.append(file.read().rstrip("\n"))
        except OSError:
            pass  # it has just ended
    return names


def _still_open() -> list[str]:
    found = []
    for fd in _child.inherited:
        try:
            found.append(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except OSError:
            pass  # closed since
    return found


def collect(facts: dict[str, Any]) -> bytes:
    """In the process: its answer, from what the server loop knows and procfs."""
    from . import _atfork

    try:
        facts["age"] = read_age("self")
        facts["threads"] = _threads()
    except OSError:
        pass  # no procfs, as after chroot(2)
    facts["at_fork"] = {**_atfork.counts, "modules": _atfork.modules}
    facts["inherited"] = _still_open()
    facts["memory"] = read_memory("self")
    memory = _memory_stats()
    if memory:
        facts["allocator"] = memory
    return _afork.pack_strings([*_flat("", facts)])


def _memory_stats() -> dict[str, Any]:
    try:
        module: Any = __import__("afork._memory", fromlist=["stats"])
    except ImportError:
        return {}
    found: dict[str, Any] = module.stats()
    return found


def _flat(prefix: str, facts: dict[str, Any]) -> Iterator[bytes]:
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{key}.", value)
            continue
        yield f"{prefix}{key}".encode()
        if value is None:
            yield b"n"
        elif isinstance(value, bool):
            yield b"b%d" % value
        elif isinstance(value, int):
            yield b"i%d" % value
        elif isinstance(value, float):
            yield f"f{value!r}".encode()
        elif isinstance(value, (list, tuple)):
            items = [os.fsencode(str(item)) for item in value]
            yield b"l" + _afork.pack_strings(items)
        else:
            yield b"t" + os.fsencode(str(value))


def _value(data: bytes) -> Any:
    kind, text = data[:1], data[1:]
    if kind == b"n":
        return None
    if kind == b"i" and len(text) <= 40:
        return int(text)
    if kind == b"b":
        return text == b"1"
    if kind == b"f":
        return float(text)
    if kind == b"l":
        return [os.fsdecode(item) for item in _afork.unpack_strings(text)]
    if kind == b"t":
        return os.fsdecode(text)
    raise ValueError("a value of no known kind")


def decode(payload: bytes) -> dict[str, Any]:
    """In the application: the answer; ValueError for what is none."""
    strings = _afork.unpack_strings(payload)
    if len(strings) % 2:
        raise ValueError("a key without a value")
    facts: dict[str, Any] = {}
    for key, value in zip(strings[::2], strings[1::2], strict=True):
        *levels, last = key.decode("utf-8", "replace").split(".")
        at = facts
        for level in levels[:4]:
            at = at.setdefault(level, {})
            if not isinstance(at, dict):
                raise ValueError("a key below a value")
        at[last] = _value(value)
    return facts
