"""The contents of reports, decoded. Their bytes are those of docs/protocol.rst."""

from __future__ import annotations

import signal
import struct
from typing import TYPE_CHECKING

from . import _afork
from ._errors import ProtocolError, RemoteError, TemplateError

if TYPE_CHECKING:
    import resource

EXITED = struct.Struct("=QIi18q")
STARTED = struct.Struct("=I")
SPAWNED = struct.Struct("=QI")
FAILED = struct.Struct("=QiB")
TOKEN = struct.Struct("=Q")
#: PID_MAX_LIMIT of the kernel.
PID_MAX = 1 << 22
#: enum afork_stage, by number.
STAGES = ("", "fork", "setup", "cwd", "exec")


def error_from(payload: bytes) -> BaseException:
    """The exception that an error report stands for."""
    fields = [x.decode("utf-8", "replace") for x in _afork.unpack_strings(payload)]
    stage, number, type, message, traceback, filename = fields
    if type == "ProtocolError":
        return ProtocolError(message)
    if int(number):
        error = OSError(int(number), message, *([filename] if filename else []))
        error.add_note(f"afork: {stage} failed in the process")
        return error
    if type == "TemplateError":
        return TemplateError(message)
    return RemoteError(stage, type, message, traceback)


def usage_fields(usage: resource.struct_rusage) -> tuple[int, ...]:
    """The fields of a struct rusage in the order of an exited report."""
    user, system = divmod(usage[0], 1), divmod(usage[1], 1)
    times = (user[0], user[1] * 1e6, system[0], system[1] * 1e6)
    return tuple(int(x) for x in (*times, *usage[2:]))


def check_pidfd(fd: int) -> None:
    """ValueError unless it is one: the peer may have sent anything."""
    try:
        signal.pidfd_send_signal(fd, 0)
    except (ProcessLookupError, PermissionError):
        pass
    except OSError as exc:
        raise ValueError("a descriptor that is no pidfd") from exc
