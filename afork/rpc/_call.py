"""A call as the application sees it, and what can come of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from afork._state import next_id

from ._codecs import Codec, close_all
from ._kinds import KEYWORDS

if TYPE_CHECKING:
    from ._connection import Connection
    from ._stream import Items


class Event(NamedTuple):
    """What a process has sent with `afork.rpc.event`."""

    #: Id of the call that has sent it, 0 for none.
    call_id: int
    args: tuple[Any, ...]


class Captured(NamedTuple):
    """The result of a call made with ``capture=True``."""

    value: Any
    #: What was written to descriptors 1 and 2 meanwhile; the last 16 MiB.
    stdout: bytes
    stderr: bytes
    #: Whether one of them was longer.
    truncated: bool = False


def attach_output(error: BaseException, output: tuple[bytes, bytes, bool]) -> None:
    """Let a failed call keep what it has written."""
    captured = Captured(None, *output)
    try:
        error.captured = captured  # type: ignore[attr-defined]
    except AttributeError:
        pass  # one with __slots__
    for name, data in ("stdout", captured.stdout), ("stderr", captured.stderr):
        if data:
            text = data[-4096:].decode("utf-8", "replace").rstrip("\n")
            error.add_note(f"{name} of the call:\n{text}")


class Descriptors:
    """Descriptors of a call that has not been sent; owned."""

    __slots__ = ("fds",)

    def __init__(self, fds: tuple[int, ...]) -> None:
        self.fds = fds

    def close(self) -> None:
        """Close them; more than once does no harm."""
        fds, self.fds = self.fds, ()
        close_all(fds)

    __del__ = close


class Call(asyncio.Future[Any]):
    """The answer to a call, to be awaited; cancelling it cancels the call."""

    __slots__ = (
        "connection",
        "fds",
        "id",
        "kind",
        "on_event",
        "options",
        "output",
        "payload",
        "stream",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        kind: int,
        payload: bytes,
        fds: tuple[int, ...],
    ) -> None:
        super().__init__(loop=loop)
        #: Number of the call in this application.
        self.id = next_id()
        self.kind = kind
        #: The arguments, encoded; None once they need not be sent any more.
        self.payload: bytes | None = payload
        self.fds = Descriptors(fds) if fds else None
        self.options: list[bytes] | None = None
        self.on_event: Callable[[Event], object] | None = None
        self.output: tuple[bytes, bytes, bool] | None = None
        self.stream: Items | None = None
        self.connection: Connection | None = None

    def cancel(self, msg: Any = None) -> bool:
        """Cancel the call; see `Rpc` and `Pool` for what that does to it."""
        if not super().cancel(msg):
            return False
        if self.connection is not None:
            self.connection.cancelled(self)
        return True

    def forget_request(self) -> None:
        """It will not be sent (again)."""
        self.payload = None
        if self.fds:
            self.fds.close()
            self.fds = None


def encode_call(
    loop: asyncio.AbstractEventLoop,
    codec: Codec,
    kind: int,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    make: type[Call] = Call,
) -> Call:
    """A call with its arguments encoded.

    Raises:
        Exception: whatever the codec raises for them; a note says what to do.
    """
    try:
        if kwargs:
            payload, fds = codec.encode((args, kwargs))
            kind |= KEYWORDS
        else:
            payload, fds = codec.encode(args)
    except Exception as exc:
        from ._advice import advise

        advise(exc, codec, (*args, *kwargs.values()))
        raise
    return make(loop, kind, payload, fds)
