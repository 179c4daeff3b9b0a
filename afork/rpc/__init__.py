"""What code that runs in the process of an `afork.Rpc` or `afork.Pool` calls.

::

    import afork.rpc

    def work(n):
        for i in range(n):
            ...
            afork.rpc.event("progress", i, n)
        return n

Everywhere else these functions raise RuntimeError.
"""

from __future__ import annotations

TYPE_CHECKING = False  # see afork/__init__.py
if TYPE_CHECKING:
    from ._serve import Server

__all__ = ["call_id", "event", "flush", "retire"]

#: Who serves calls in this process; set by the back end.
_server: Server | None = None


def _here() -> Server:
    if _server is None:
        raise RuntimeError("only the functions of an afork.Rpc or Pool can do this")
    return _server


def event(*args: object) -> None:
    """Send values to the application's ``on_event``, ahead of the result.

    They arrive in the order sent, with the id of the call that is running. A
    synchronous process waits until the socket has taken them; an asynchronous
    one sends them at the end of the turn of its loop.

    Raises:
        RuntimeError: not in a process that serves calls.
        Exception: whatever the codec raises for values that it cannot encode.
    """
    _here().event(args)


def flush() -> None:
    """Wait until everything sent so far is out of this process.

    Only an asynchronous process has to, and only before it ends itself
    abruptly. The loop of the process stands still meanwhile.
    """
    _here().flush()


def call_id() -> int:
    """The id of the call that is running here: 0 outside of one."""
    return _here().call_id()


def retire() -> None:
    """Ask the pool for no further calls: the process ends after those it has.

    More than once does no harm; without a pool it has no effect.
    """
    _here().retire()
