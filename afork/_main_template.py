"""Templates forked from the main program itself: Early and Template.

They share what the program has loaded so far, and inherit what it has open.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys

from . import _afork, _child, _memory

TYPE_CHECKING = False  # see __init__.py
if TYPE_CHECKING:
    from typing import Any

    from ._fork import Fork
    from ._process import Process


def fork_main() -> Fork | None:
    """Fork the main program, as prepared so far, as a template.

    The explicit form of ``from afork.template import TEMPLATE``. Its processes
    have everything that the program has defined and loaded up to this call;
    they also inherit the descriptors that it has open.

    Returns:
        The template; None in a process that was made by afork (it has loaded
        the main program to find a function).

    Raises:
        RuntimeError: there are other threads or a running event loop, which a
            fork would tear.
        OSError: the process could not be forked.
    """
    process = _fork_here("fork_main()")
    if process is None:
        return None
    from ._fork import Fork

    process.has_main = True
    return Fork._wrap(process)


def fork_early() -> None:
    """Fork an almost empty program as the root of all later processes."""
    process = _fork_here("afork.early")
    if process is not None:
        from ._default import set_early

        set_early(process)


def _fork_here(what: str) -> Process | None:
    if _child.serving:
        return None
    if _has_other_threads():
        names = ""
        if "threading" in sys.modules:
            threads = sys.modules["threading"].enumerate()
            names = ": " + ", ".join(t.name for t in threads)
        raise RuntimeError(f"{what} needs a program without other threads{names}")
    asyncio_events = sys.modules.get("asyncio.events")
    if asyncio_events is not None and asyncio_events._get_running_loop() is not None:
        raise RuntimeError(f"{what} must come before the event loop runs")

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    _child.flush()
    # Here, where nobody shares it yet: in the template it would be copied.
    _memory.collapse()
    try:
        pid = _afork.fork()
    except OSError:
        ours.close()
        theirs.close()
        raise
    if pid == 0:
        ours.close()
        _become_template(theirs.detach())
    theirs.close()
    # Not before: Early's template is to have nothing of asyncio.
    from ._process import Process

    process = Process(_afork.Channel(ours.detach()))
    process.watch()
    process.pid = pid
    process.pidfd = os.pidfd_open(pid)
    process.direct = True
    process.path = list(sys.path)
    process.watch_exit()
    return process


def _has_other_threads() -> bool:
    """Whether a fork would tear something; threads of libraries count, too.

    One that has been joined takes a moment to leave the kernel: that is
    waited for, 0.2 s at most.
    """
    import time

    end = time.monotonic() + 0.2
    while len(os.listdir("/proc/self/task")) > 1:
        threading = sys.modules.get("threading")
        known = threading is None or threading.active_count() > 1
        if known or time.monotonic() > end:
            return True
        os.sched_yield()
    return False


def _become_template(fd: int) -> None:
    """In the child: nothing of the program goes on here. Never returns."""
    os.setsid()
    atexit._clear()
    _reset_signals()
    _leave_imports()
    _child.inherited = _open_but(fd)
    _child.prepare()
    _child.serve(fd, False)


def _open_but(mine: int) -> tuple[int, ...]:
    """The descriptors that the program had open beyond stdio, for stats()."""
    fds = sorted(int(name) for name in os.listdir("/proc/self/fd"))
    # The one that listed them is closed by now.
    there = (fd for fd in fds if os.path.exists(f"/proc/self/fd/{fd}"))
    return tuple(fd for fd in there if fd > 2 and fd != mine)


def _reset_signals() -> None:
    """Handlers of the program belong to the program."""
    # The extension module: the Python one would cost every worker an enum.
    import _signal  # type: ignore[import-not-found]

    # On 3.11 a signal here would wake the program's event loop.
    _signal.set_wakeup_fd(-1)
    for number in range(1, _signal.NSIG):
        handler = _signal.getsignal(number)
        if callable(handler):
            default = number == _signal.SIGINT
            _signal.signal(
                number, _signal.default_int_handler if default else _signal.SIG_DFL
            )


def _leave_imports() -> None:
    """Undo being in the middle of an import, which will never be finished.

    Whoever imports the same modules in a worker would wait for the lock of
    this thread, or be given half a module with a warning.
    """
    import _frozen_importlib
    import _thread

    me = _thread.get_ident()
    bootstrap: Any = _frozen_importlib
    for reference in list(bootstrap._module_locks.values()):
        lock = reference()
        while lock is not None and lock.owner == me:
            lock.release()
    bootstrap._blocking_on.clear()
    for module in list(sys.modules.values()):
        spec = getattr(module, "__spec__", None)
        if spec is not None and getattr(spec, "_initializing", False):
            spec._initializing = False
