"""Log records of workers, handled by the application's loggers.

A record is one packet on a SOCK_SEQPACKET socket of its own. Not a stream:
what two threads, or a worker and a process that it has forked, write at the
same time must not mix, and a lock reaches only the threads. A packet arrives
whole or not at all, whenever its sender dies, and needs no framing. The price
is its size, which the socket's buffer limits: by default a little over
400 KiB, so the cap is 256 KiB, and longer records are cut.

A packet is a pickled dict of the attributes of a `logging.LogRecord` as
`logging.makeLogRecord` takes it, all of them plain objects: the message is
rendered, the traceback is text. Other objects, which users add as ``extra``,
are `_Extra`s, pickled apart, as the application may not be able to load them.

The module imports logging: in a worker, import it only to call `install`.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import pickle
import socket
import sys
import termios
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping

#: Bytes of a packet.
RECORD_MAX = 256 * 1024
#: Of one wake-up of the loop: records, and bytes after which no more are read.
_RECORDS, _BYTES = 64, 256 * 1024
#: Bytes of an extra that are left of it when a record is cut.
_EXTRA_MAX = 1024

_PLAIN = (str, int, float, bool, type(None))
#: What every record has.
_STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {
    "taskName",
    "message",
    "asctime",
    "worker_pid",
}


# -- in the worker


def install(
    fd: int,
    level: int = logging.WARNING,
    levels: Mapping[str, int] | None = None,
) -> None:
    """Send the log records of this process to the application from now on.

    The application handles them, once: handlers that this process has, for
    example because its template has loaded a main program that configures
    logging, are dropped. What configures logging later adds to this.

    Args:
        fd: The worker's end of a `LogRelay`, owned from now on.
        level: The level of the application's root logger.
        levels: Those of the application's other loggers, see `levels`; None
            leaves them as they are here.
    """
    root = logging.getLogger()
    for logger in (root, *_loggers()):
        for handler in logger.handlers[:]:
            # Not closed: some write what they have kept when they are.
            logger.removeHandler(handler)
            if isinstance(handler, _Sender):
                handler.sock.close()
        logger.propagate = True
        logger.disabled = False
        if levels is not None and logger is not root:
            logger.setLevel(levels.get(logger.name, logging.NOTSET))
    for name in levels or ():
        logging.getLogger(name).setLevel((levels or {})[name])
    logging.disable(logging.NOTSET)
    root.setLevel(level)
    root.addHandler(_Sender(fd))


class _Sender(logging.Handler):
    """Sends records; a forked process inherits it and may use it as well."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self.sock = socket.socket(fileno=fd)
        self.pid = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields = _fields(record, self.pid)
        except Exception:  # arguments that do not fit the message, for example
            self.handleError(record)
            return
        try:
            self.send(fields)
        except OSError as exc:
            if exc.errno is None:
                raise  # not the system's: a signal handler's TimeoutError
            # The application has gone, this process was told to outlive it.
            if logging.lastResort and record.levelno >= logging.lastResort.level:
                logging.lastResort.handle(record)

    def send(self, fields: dict[str, Any]) -> None:
        size = RECORD_MAX
        packet = pickle.dumps(fields, 5)
        while True:
            if len(packet) > size:
                packet = pickle.dumps(_cut(fields, size), 5)
            try:
                self.sock.send(packet, socket.MSG_NOSIGNAL)
                return
            except OSError as exc:
                # A smaller buffer than usual, or no memory in one piece.
                if exc.errno not in (errno.EMSGSIZE, errno.ENOBUFS) or size < 4096:
                    raise
                size //= 2


class _Extra:
    """An attribute that is not plain: its pickle, "" if it has none, and repr."""

    __slots__ = ("data", "text")

    def __init__(self, data: bytes, text: str) -> None:
        self.data = data
        self.text = text

    def __reduce__(self) -> tuple[type[_Extra], tuple[bytes, str]]:
        return _Extra, (self.data, self.text)

    def value(self) -> object:
        if self.data:
            try:
                return pickle.loads(self.data)
            except Exception:  # foreign code, or a module that is not here
                pass
        return self.text


def _fields(record: logging.LogRecord, pid: int) -> dict[str, Any]:
    """The attributes of a record, as `logging.handlers.QueueHandler` prepares it."""
    fields = record.__dict__.copy()
    fields["msg"] = record.getMessage()
    fields["args"] = None
    fields.pop("message", None)  # the same; formatters leave it behind
    if record.exc_info and not record.exc_text:
        fields["exc_text"] = _formatter.formatException(record.exc_info)
    fields["exc_info"] = None
    fields["worker_pid"] = pid
    for name, value in fields.items():
        if type(value) not in _PLAIN:
            fields[name] = _extra(value)
    return fields


_formatter = logging.Formatter()


def _extra(value: object) -> _Extra:
    try:
        text = repr(value)
    except Exception as exc:
        text = f"<{type(value).__name__}, whose repr raised {type(exc).__name__}>"
    try:
        data = pickle.dumps(value, 5)
    except Exception:
        data = b""
    return _Extra(data, text)


def _cut(fields: dict[str, Any], size: int) -> dict[str, Any]:
    """The same, in a pickle of at most that size."""
    shares = {"msg": size // 2, "exc_text": size // 4, "stack_info": size // 8}
    small: dict[str, Any] = {}
    left = size // 16
    for name, value in fields.items():
        if isinstance(value, _Extra):
            value = value.text
        if isinstance(value, str):
            value = _shorten(value, shares.get(name, _EXTRA_MAX))
            if name not in _STANDARD:
                left -= len(name) + len(value) * 4
                if left < 0:
                    continue
        small[name] = value
    return small


def _shorten(text: str, size: int) -> str:
    data = text.encode("utf-8", "surrogatepass")
    if len(data) <= size:
        return text
    kept = data[: size - 64].decode("utf-8", "ignore")
    return f"{kept} [{len(text) - len(kept)} characters cut]"


# -- in the application


def levels() -> dict[str, int]:
    """The levels of all loggers but the root that have one of their own."""
    return {x.name: x.level for x in _loggers() if x.level != logging.NOTSET}


def _loggers() -> list[logging.Logger]:
    found = logging.root.manager.loggerDict.copy().values()
    return [x for x in found if isinstance(x, logging.Logger)]


class LogRelay:
    """The application's end: hands a worker's records to its own loggers.

    Send ``write_fd`` to the worker, which calls `install` with it, then call
    `close_write`. Belongs to the loop's thread.

    Each record is handled by the logger of its name, if that is enabled for
    its level, with its filters, handlers and propagation. It has an attribute
    ``worker_pid``; ``process`` differs from it if the worker has forked.

    Bytes that are no record end it, with one warning by the logger "afork".
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        extra: Mapping[str, object] | None = None,
    ) -> None:
        """Make the sockets and read ours on a loop from now on.

        Args:
            loop: The loop that reads.
            extra: Further attributes of each record.

        Raises:
            OSError: EMFILE.
            ValueError: the name of an extra is one of a record's own.
        """
        self._extra = dict(extra or {})
        for name in self._extra:
            if name in _STANDARD:
                raise ValueError(f"{name!r} is an attribute of every record")
        self._loop = loop
        self._closing = False
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock = ours
        # Twice as much is set, if the system's limit allows.
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * RECORD_MAX)
        #: The worker's end, or -1 once it is closed here.
        self.write_fd = theirs.detach()
        try:
            ours.setblocking(False)
            loop.add_reader(ours.fileno(), self._readable)
        except BaseException:
            self._shut()
            raise

    def close_write(self) -> None:
        """Close our copy of the worker's end; again does no harm."""
        if self.write_fd >= 0:
            fd, self.write_fd = self.write_fd, -1
            os.close(fd)

    def drain(self) -> None:
        """Handle the records that are there now; never waits.

        For when the worker has died. The end of file is not waited for: a
        process that the worker has forked may have the socket.
        """
        if self._sock.fileno() < 0:
            return
        count = bytearray(4)
        fcntl.ioctl(self._sock, termios.FIONREAD, count)
        self._read(sys.maxsize, int.from_bytes(count, sys.byteorder))

    def close(self) -> None:
        """Handle the records that are there now, then close both ends.

        Again does no harm.
        """
        if self._closing:
            return  # a handler calls it while it runs
        self._closing = True
        try:
            self.drain()
        finally:
            self._shut()

    def abandon(self) -> None:
        """In a forked child of the application: close, touch no loop."""
        self._closing = True
        self.close_write()
        self._sock.close()

    def _shut(self) -> None:
        self.close_write()
        if self._sock.fileno() >= 0:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._sock.fileno())
            self._sock.close()

    def __del__(self) -> None:
        if hasattr(self, "write_fd"):
            self._shut()

    def _readable(self) -> None:
        self._read(_RECORDS, _BYTES)

    def _read(self, records: int, size: int) -> None:
        buffer = bytearray(RECORD_MAX)
        view = memoryview(buffer)
        # A handler may call drain() or close().
        while records > 0 and size > 0 and self._sock.fileno() >= 0:
            try:
                # MSG_TRUNC: the packet's own length, if it is longer.
                length = self._sock.recv_into(buffer, 0, socket.MSG_TRUNC)
            except BlockingIOError:
                return
            except OSError:  # reset
                length = 0
            if not length:
                self._shut()
                return
            records -= 1
            size -= length
            if length > RECORD_MAX:
                self._refuse(f"a record of {length} bytes")
                return
            try:
                record = self._rebuild(pickle.loads(view[:length]))
            except Exception as exc:
                self._refuse(f"no record: {type(exc).__name__}: {exc}")
                return
            self._handle(record)

    def _rebuild(self, fields: dict[str, Any]) -> logging.LogRecord:
        name, level = fields["name"], fields["levelno"]
        if not isinstance(name, str) or not isinstance(level, int):
            raise TypeError("a name or level of another type")
        for name, value in fields.items():
            if isinstance(value, _Extra):
                fields[name] = value.value()
        fields.update(self._extra)
        return logging.makeLogRecord(fields)

    def _handle(self, record: logging.LogRecord) -> None:
        logger = logging.getLogger(record.name)
        if not logger.isEnabledFor(record.levelno):
            return
        try:
            logger.handle(record)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:  # a filter's, or a handler's of its own
            self._loop.call_exception_handler(
                {
                    "message": "a worker's log record could not be handled",
                    "exception": exc,
                }
            )

    def _refuse(self, what: str) -> None:
        self._shut()
        logging.getLogger("afork").warning(
            "a worker sent %s; its log records are not read any more", what
        )
