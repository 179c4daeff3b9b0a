"""The synchronous back end: one call at a time, in the order of arrival.

An answer is sent before the next call begins. So when the process dies, the
application knows which call it was, and that those behind it never began.
"""

from __future__ import annotations

import struct
from collections import deque

from . import _serve
from ._codecs import close_all
from ._kinds import (
    CALL,
    CANCEL,
    CREDIT,
    FDSTORE,
    ITEM,
    KEYWORDS,
    OPTIONS,
    RESULT,
    STOP,
    STREAM,
    WINDOW,
)

TYPE_CHECKING = False  # see afork/__init__.py
if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator
    from typing import Any

    from ._options import Applied
    from ._serve import Frame

_CREDIT = struct.Struct("=I")


class SyncServer(_serve.Server):
    """Serves calls with a plain function."""

    def __init__(self, sock: socket.socket, *args: Any) -> None:
        super().__init__(sock, *args)
        self.todo: deque[Frame] = deque()
        #: The call that is running.
        self.current = 0
        #: Items that the stream which is running may send.
        self.credit = 0
        self.cancelled = False
        #: Arguments to be freed once the call has been answered.
        self.large: object = None

    def main(self) -> None:
        """Serve until the application has no more calls."""
        try:
            try:
                self.find()
                self.init()
            except BaseException as exc:
                self.send_error(0, exc, "init")
                self.link.flush(True)
                return
            self.send_ready()
            self.link.flush(True)
            self.serve()
            done = self.config.text("done")
            if done:
                self.resolve(done)()
        except (BrokenPipeError, ConnectionResetError):
            pass  # nobody is there to be told anything

    def serve(self) -> None:
        link, todo, flush = self.link, self.todo, self.link.flush
        while True:
            # Between calls, too: what has been cancelled must not begin.
            self.take(not todo)
            if not todo:
                if link.eof:
                    return
                flush(True)  # that calls were forgotten
                continue
            kind, id, payload, fds = todo.popleft()
            self.current = id
            if kind == CALL or kind == CALL | KEYWORDS:
                self.call(kind, id, payload, fds)
            elif kind == STREAM or kind == STREAM | KEYWORDS:
                self.stream(kind, id, payload, fds)
            elif kind == OPTIONS:
                self.take_options(id, payload)
            elif kind == FDSTORE:
                self.take_store(fds)
            # What is left are credits of streams that have ended.
            self.current = 0
            flush(True)
            self.large = None
            if self.store is not None and self.store.full:
                self.store.clear()

    def take_store(self, fds: tuple[int, ...]) -> None:
        from ._fdstore import Keeper

        self.store = Keeper(fds)

    def take(self, wait: bool) -> None:
        """Take in the frames that have arrived."""
        todo = self.todo
        for frame in self.link.receive(wait):
            kind, id, payload, _ = frame
            if kind == CANCEL:
                self.cancel(id)
            elif kind == CREDIT and id == self.current:
                self.credit += _CREDIT.unpack(payload)[0]
            else:
                todo.append(frame)

    def cancel(self, id: int) -> None:
        """Forget a call that has not begun, or end the stream that runs."""
        if id == self.current:
            self.cancelled = True
            return
        self.options.pop(id, None)
        for frame in [x for x in self.todo if x[1] == id]:
            self.todo.remove(frame)
            close_all(frame[3])
            if frame[0] & ~KEYWORDS in (CALL, STREAM):
                self.link.send(STOP, id, b"")

    # -- calls

    def call(self, kind: int, id: int, payload: bytes, fds: tuple[int, ...]) -> None:
        result: Any = None
        try:
            args, kwargs = self.decode(kind, payload, fds)
            if fds:
                # Giving back what they have mapped takes as long as filling a
                # third of it: not while somebody waits.
                self.large = args, kwargs
            if self.options and id in self.options:
                with self.applied(id):
                    result = self.func(*args, **kwargs)
            else:
                result = self.func(*args, **kwargs)
            self.end_if_forked(None)
            self.send(RESULT, id, result)
        except BaseException as exc:
            error = exc
            self.end_if_forked(error)
            if hasattr(result, "__await__"):
                error = TypeError("the function is async: it needs asynchronous=True")
                getattr(result, "close", int)()  # or it warns of not being awaited
            self.send_error(id, error)

    def applied(self, id: int) -> Applied:
        """The options that came ahead of a call."""
        from ._options import Applied

        return Applied(self, id, self.options.pop(id, {}))

    def stream(self, kind: int, id: int, payload: bytes, fds: tuple[int, ...]) -> None:
        try:
            args, kwargs = self.decode(kind, payload, fds)
            # The generator runs within them, not only the call that makes it.
            with self.applied(id):
                result: Any = self.func(*args, **kwargs)
                self.send_items(id, iter(result))
            self.link.send(STOP, id, b"")
        except BaseException as exc:
            self.end_if_forked(exc)
            self.send_error(id, exc)

    def send_items(self, id: int, items: Iterator[object]) -> None:
        self.cancelled = False
        self.credit = WINDOW
        for item in items:
            self.end_if_forked(None)
            self.send(ITEM, id, item)
            self.credit -= 1
            self.link.flush(True)
            self.take(False)
            while self.credit <= 0 and not self.cancelled and not self.link.eof:
                self.take(True)
            if self.cancelled or self.credit <= 0:
                break
        self.end_if_forked(None)
        close = getattr(items, "close", None)
        if close is not None:
            close()
        if self.credit <= 0 and not self.cancelled:
            # Half closed: what is read still must not look like all there is.
            raise ConnectionResetError("the end of the socket came within a stream")

    # -- what afork.rpc offers

    def call_id(self) -> int:
        return self.current

    def sent(self) -> None:
        self.link.flush(True)


def enter(sock: socket.socket, *args: Any) -> None:
    """What the process runs."""
    server = SyncServer(sock, *args)
    _serve.publish(server)
    server.main()
