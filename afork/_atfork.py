"""Who has registered callbacks at fork: each makes every later start dearer.

CPython keeps them where nobody can look, so those of Python code are counted
as they are registered. Those of C libraries (pthread_atfork) stay unseen.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # see __init__.py
if TYPE_CHECKING:
    from collections.abc import Callable

#: How many of each kind, since `watch`.
counts = {"before": 0, "after_in_parent": 0, "after_in_child": 0}
#: The modules that have registered any, in order.
modules: list[str] = []

#: Modules of the standard library that register some when they are loaded.
_KNOWN = ("threading", "random", "logging", "concurrent.futures.thread")

_register = os.register_at_fork


def _counted(**callbacks: Callable[[], object]) -> None:
    _register(**callbacks)
    for kind in callbacks:
        counts[kind] += 1
    name = sys._getframe(1).f_globals.get("__name__", "?")
    if name not in modules:
        modules.append(name)


_counted.__name__ = _counted.__qualname__ = "register_at_fork"
_counted.__doc__ = _register.__doc__


def watch() -> None:
    """From here on; what is loaded already is named if it is known."""
    modules.extend(name for name in _KNOWN if name in sys.modules)
    os.register_at_fork = _counted  # type: ignore[assignment]
