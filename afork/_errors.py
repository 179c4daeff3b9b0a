"""The errors of afork, ordered by what a caller would do about them.

::

    AforkError
      ProtocolError   the bytes were wrong: a bug, or a foreign peer
      TemplateError   the template could not start or has died
      ClosedError     the object was used after run, exec, to_fh or close
      RemoteError     code in the process raised
      WorkerLost      the process ended before it could do what was asked

What the operating system refuses stays an :class:`OSError`. All can be
pickled: they do cross processes.
"""

from __future__ import annotations

import signal

TYPE_CHECKING = False  # see afork/__init__.py
if TYPE_CHECKING:
    from .rpc._call import Captured


class AforkError(Exception):
    """Base of all errors that afork defines."""


class ProtocolError(AforkError):
    """A peer sent bytes or descriptors that mean nothing."""


class ClosedError(AforkError):
    """The object was configured after run, exec, to_fh or close."""


def _fate(status: int | None) -> str:
    """What a wait status says, in words."""
    if status is None:
        return "status unknown"
    if status & 0x7F:
        number = status & 0x7F
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        return f"killed by {name}"
    return f"exit status {status >> 8 & 0xFF}"


class _ProcessError(AforkError):
    """An error about a process: its number and wait status, where known."""

    def __init__(
        self, message: str, pid: int | None = None, status: int | None = None
    ) -> None:
        super().__init__(message)
        #: Process id, or None if the process never told it.
        self.pid = pid
        #: Wait status as ``os.waitstatus_to_exitcode`` takes it, or None.
        self.status = status

    def __str__(self) -> str:
        text = super().__str__()
        if self.pid is None:
            return text
        return f"{text} (pid {self.pid}, {_fate(self.status)})"

    def __reduce__(
        self,
    ) -> tuple[type[_ProcessError], tuple[object, ...], dict[str, object]]:
        return type(self), (self.args[0], self.pid, self.status), self.__dict__


class TemplateError(_ProcessError):
    """The template of a process could not start or has died.

    ``pid`` and ``status`` are the template's, ``__cause__`` its own error if
    it has reported one.
    """


class WorkerLost(_ProcessError):
    """The process ended before it could do what was asked of it.

    ``stderr`` is the last of what it has written to standard error, if that
    was captured; it is part of ``str()``. ``captured`` is what the call has
    written, if it was made with ``capture=True`` and had begun; ends of it are
    in notes.
    """

    captured: Captured | None = None

    def __init__(
        self,
        message: str,
        pid: int | None = None,
        status: int | None = None,
        *,
        stderr: str = "",
    ) -> None:
        super().__init__(message, pid, status)
        #: The end of its standard error, or "".
        self.stderr = stderr

    @property
    def signal(self) -> int | None:
        """Number of the signal that killed the process, None for another end."""
        return (self.status or 0) & 0x7F or None

    def __str__(self) -> str:
        text = super().__str__()
        if self.stderr:
            lines = self.stderr.rstrip("\n").splitlines()
            text += "\n\nLast on its standard error:\n"
            text += "\n".join("  " + x for x in lines)
        return text


class RemoteError(AforkError):
    """Code in the process raised.

    Attributes:
        stage: What was being done: ``"eval"``, ``"require"``, ``"set"``,
            ``"init"`` or ``"run"``.
        type: Name of the exception's class, qualified unless it is a builtin.
        message: ``str()`` of the exception.
        traceback: The process's own traceback as text, ending in a newline,
            or "".
    """

    def __init__(
        self, stage: str, type: str, message: str, traceback: str = ""
    ) -> None:
        super().__init__(stage, type, message, traceback)
        self.stage = stage
        self.type = type
        self.message = message
        self.traceback = traceback

    def __str__(self) -> str:
        text = f"{self.stage}: {self.type}"
        if self.message:
            text += f": {self.message}"
        if self.traceback:
            lines = self.traceback.rstrip("\n").splitlines()
            text += "\n\nIn the process:\n" + "\n".join("  " + x for x in lines)
        return text
