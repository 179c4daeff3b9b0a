"""The memory of a template: huge pages and frozen objects, seen from Python.

The work is done in C, see src/binding/memory.c: a template that has loaded
nothing of this module shares nothing the less.
"""

from __future__ import annotations

import gc
import os
import sys

from . import _afork

#: For tests, and for who has trouble: a comma-separated list of what a template
#: is not to do, out of `OFF`. Read when it starts.
VARIABLE = "AFORK_MEMORY_OFF"
OFF = ("arena", "collapse", "file", "gc", "immortal", "text")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def _is_off(name: str) -> bool:
    return name in os.environ.get(VARIABLE, "").split(",")


def setup() -> None:
    """Once at the start of a template."""
    _afork.memory_setup(*map(_is_off, OFF))


def collapse() -> None:
    """Move the memory of a main program into huge pages, if it is large."""
    if not _is_off("collapse"):
        _afork.memory_collapse()


def needs_tunable() -> bool:
    """Whether a template's heap can have huge pages from birth only.

    glibc keeps to the tunable in every worker as well, where it rounds the heap
    up to 2 MiB: where the kernel can collapse, that is the better way.
    """
    found = _afork.huge_pages()
    return found == "old kernel" or (found == "ok" and _is_off("collapse"))


def tunables(theirs: bytes | None) -> bytes:
    """The application's tunables of glibc, and ours unless it has set that."""
    ours = b"glibc.malloc.hugetlb"
    entries = theirs.split(b":") if theirs else []
    if not any(entry.partition(b"=")[0] == ours for entry in entries):
        entries.append(ours + b"=1")
    return b":".join(entries)


def _types() -> list[object]:
    """All classes. The collector does not know those that are part of CPython."""
    found: list[object] = [object]
    seen = {id(object)}
    for cls in found:
        subclasses: list[Any] = type.__subclasses__(cls)  # type: ignore[arg-type]
        for sub in subclasses:
            if id(sub) not in seen:
                seen.add(id(sub))
                found.append(sub)
    return found


def freeze_all() -> None:
    """Share all objects that there are, for good.

    Raises:
        RuntimeError: the process has forked; its children have copies.
    """
    # Some versions walk over thawed objects only.
    _freeze(_types(), only_new=False)


def freeze_new() -> None:
    """Share what has come since, in a process whose objects were shared before.

    What a module has got is found. What else was put into an older object is only
    if the collector knows it, or something new refers to it.
    """
    roots = [
        object.__getattribute__(module, "__dict__")
        for module in [*sys.modules.values()]
        if issubclass(type(module), type(sys))  # may be anything, and load on a touch
    ]
    _freeze(roots, only_new=True)


def _freeze(roots: list[object], only_new: bool) -> None:
    enabled = gc.isenabled()
    gc.collect()
    # No collection may come before they are frozen again: it would take those that
    # are immortal already out of the collector's books (3.14), and with them what
    # was put into them since.
    gc.disable()
    if not only_new:
        gc.unfreeze()
    try:
        _afork.immortalise(roots, only_new)
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def stats() -> dict[str, int | str | bool]:
    """What has been done to the memory of this process, and why not.

    - ``arenas``, ``arena_bytes``: memory of Python objects that can have huge
      pages from birth
    - ``private_bytes``, ``huge_bytes``: private memory, and what of it is in
      huge pages
    - ``collapse``: what became of moving the rest there at the first fork:
      "used", "not yet", "small" (under 30 MB there is nothing to gain), "old
      kernel" (before 6.1), "no huge pages" (the system forbids them),
      "refused" (``collapse_errno`` says why), "switched off"
    - ``collapsed_bytes``, ``refused_bytes``: of the last time
    - ``file_bytes``: what has been moved into files of memory, of which a fork
      copies no page tables; none while there are threads. ``file_errno``: why
      no more of it could be
    - ``frozen``: whether `Fork.freeze` was called
    - ``immortal``: "used", or why no object was made immortal;
      ``immortal_objects``: how many were; ``visited_objects``: how many were
      looked into for that, the last time
    - ``gc_frozen``: objects that the garbage collector leaves alone
    - ``text``: whether the interpreter's text was arranged so that a fork copies
      what workers use of it: "used", "not yet" (before the 32nd start), "trial"
      (it is being found out), "nothing to gain", "refused" (``text_errno`` says
      why), "switched off"; ``text_bytes``: how much is copied
    """
    found: dict[str, int | str | bool] = _afork.memory_stats()
    found["gc_frozen"] = gc.get_freeze_count()
    return found
