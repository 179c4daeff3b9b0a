"""Processes for asyncio applications, forked by a template instead of by you.

Start at :class:`Fork`. The names below load on first use (:pep:`562`), so that
``import afork`` costs nothing, starts nothing and loads no asyncio: a worker
imports it as well.
"""

from ._version import __version__ as __version__

# Type checkers take this name for true; typing would cost every worker 1 MB.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from ._errors import AforkError as AforkError
    from ._errors import ClosedError as ClosedError
    from ._errors import ProtocolError as ProtocolError
    from ._errors import RemoteError as RemoteError
    from ._errors import TemplateError as TemplateError
    from ._errors import WorkerLost as WorkerLost
    from ._fork import Fork as Fork
    from ._handles import DEVNULL as DEVNULL
    from ._handles import SOCKET as SOCKET
    from ._handles import STDOUT as STDOUT
    from ._handles import Handle as Handle
    from ._main_template import fork_main as fork_main
    from ._subprocess import create_subprocess_exec as create_subprocess_exec
    from ._subprocess import create_subprocess_shell as create_subprocess_shell
    from .pool._executor import Executor as Executor
    from .pool._pool import Pool as Pool
    from .pool._pool import PoolStats as PoolStats
    from .rpc._call import Captured as Captured
    from .rpc._call import Event as Event
    from .rpc._rpc import Rpc as Rpc
    from .rpc._shared import SharedBuffer as SharedBuffer
    from .rpc._stream import Stream as Stream

#: Path of the interpreter that templates run; None finds the application's own.
python: str | None = None

_HOMES = {
    "AforkError": "_errors",
    "ClosedError": "_errors",
    "ProtocolError": "_errors",
    "RemoteError": "_errors",
    "TemplateError": "_errors",
    "WorkerLost": "_errors",
    "Fork": "_fork",
    "DEVNULL": "_handles",
    "SOCKET": "_handles",
    "STDOUT": "_handles",
    "Handle": "_handles",
    "fork_main": "_main_template",
    "create_subprocess_exec": "_subprocess",
    "create_subprocess_shell": "_subprocess",
    "Executor": "pool._executor",
    "Pool": "pool._pool",
    "PoolStats": "pool._pool",
    "Captured": "rpc._call",
    "Event": "rpc._call",
    "Rpc": "rpc._rpc",
    "Stream": "rpc._stream",
    "SharedBuffer": "rpc._shared",
}

__all__ = sorted([*_HOMES, "python"])


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = __import__(f"{__name__}.{home}", fromlist=[name])
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
