"""The connection to a process that serves calls, on the application's side."""

from __future__ import annotations

import asyncio
import errno
import select
import struct
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from afork import _afork, _hub
from afork._errors import ClosedError, ProtocolError, RemoteError, WorkerLost
from afork._hub import hub

from ._call import Call, Captured, Event, attach_output
from ._codecs import Codec, close_all, find_codec
from ._exceptions import decode_exception
from ._fdstore import FdStore
from ._kinds import (
    CANCEL,
    CREDIT,
    ERROR,
    EVENT,
    ITEM,
    OPTIONS,
    OUTPUT,
    READY,
    RESULT,
    RETIRE,
    STOP,
)
from ._watch import Watch

if TYPE_CHECKING:
    from afork._fork import Fork

    from ._logs import LogRelay
    from ._output import OutputPipe

_CREDIT = struct.Struct("=I")

#: Bytes that wait for the socket above which further calls wait here: there
#: they can still be cancelled.
_UNSENT_MAX = 256 << 10

#: Seconds until descriptors are tried again that the kernel did not take.
_BACK_OFF = 0.01


class Connection:
    """The connection to one process that serves calls, on one loop.

    Lives for as long as the process has something to say: the loop refers to
    it, not to the `Rpc` that users hold.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fork: Fork,
        codec: Codec,
    ) -> None:
        self.loop = loop
        self.fork = fork
        self.codec = codec
        self._decode = codec.decode
        self.link: _afork.Link | None = None
        #: Calls without an answer by id, in the order sent.
        self.calls: dict[int, Call] = {}
        #: Those of them that are not in the socket's queue yet.
        self.backlog: deque[Call] = deque()
        #: Why no call can be made any more.
        self.error: BaseException | None = None
        self.ready = False
        self.finishing = False
        #: The loop has ended before the process: nobody's fault.
        self.torn_down = False
        self.on_event: Callable[[Event], object] | None = None
        self.stderr: OutputPipe | None = None
        self.stdout: OutputPipe | None = None
        self.logs: LogRelay | None = None
        #: Made with the first captured call.
        self.store: FdStore | None = None
        _connections.add(self)
        #: Done once the process has ended and everybody was told.
        self.ended: asyncio.Future[None] = loop.create_future()
        #: It takes nothing any more; what explains that can still be read.
        self._deaf = False
        self._flushing = False
        self._watch: Watch | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # -- starting

    def start(self, run: Any) -> None:
        """Connect as soon as the process has entered its server."""
        self._spawn(self._connect(run))

    def _spawn(self, coroutine: Any) -> None:
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_over)

    def _task_over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() and not self.ended.done():
            # The loop is being torn down, but somebody may wait for us in it.
            self.torn_down = True
            self.kill()
            self.close_link()
            self.before_end()
            self._tell(self.error)

    async def _connect(self, run: Any) -> None:
        try:
            sock = await run
        except Exception as exc:
            self.before_end()
            # The frames in it would keep us as long as somebody keeps it.
            await self.end(exc.with_traceback(None))
            return
        if self.ended.done():  # killed meanwhile
            sock.close()
            return
        try:
            self.link = _afork.Link(sock.detach())
            self._watch = Watch(
                self.loop, self.link.fileno(), self._on_readable, self._on_writable
            )
            self._watch_exit()
        except Exception as exc:  # no descriptor left
            self._broken(exc)
            return
        self._send_backlog()
        self._flush()

    def _watch_exit(self) -> None:
        """Notice its end although somebody else has its end of the socket.

        A process that it has forked, say: there is no end of file then.
        """
        self._when_exited(weakref.WeakMethod(self._on_exit))

    def _when_exited(self, find: Callable[[], Callable[[], None] | None]) -> None:
        """Call what is found then, on our loop, once the end is known."""
        loop = self.loop

        def exited() -> None:  # in any thread
            callback = find()
            if callback is not None and not loop.is_closed():
                try:
                    loop.call_soon_threadsafe(callback)
                except RuntimeError:
                    pass  # closed since

        process = self.fork._process
        with hub().lock:
            process.watch_exit()
            process.when_exited(exited)

    def _on_exit(self) -> None:
        link = self.link
        if link is None:
            return
        # What it has sent is there; the end of it, too, unless it is held up.
        poll = select.poll()
        poll.register(link.fileno(), select.POLLIN)
        while self.link is link and (link.pending or poll.poll(0)):
            self._on_readable()
        if self.link is link:
            self._on_eof()

    # -- sending

    def submit(self, call: Call) -> None:
        """Send a call as soon as the process can take it."""
        call.connection = self
        self.calls[call.id] = call
        link = self.link
        if link is None or self.backlog or self._deaf or link.queued > _UNSENT_MAX:
            self.backlog.append(call)
            return
        self._queue(link, call)
        if len(self.calls) == 1:
            self._flush()  # there is nothing to send it together with
        elif not self._flushing:
            self._flushing = True
            self.loop.call_soon(self._flush)

    def _queue(self, link: _afork.Link, call: Call) -> None:
        try:
            if call.options:
                if b"capture" in call.options[::2] and self.store is None:
                    self.store = FdStore.give(link)
                options = _afork.pack_strings(call.options)
                link.send(OPTIONS, call.id, options)
            fds = call.fds.fds if call.fds else ()
            link.send(call.kind, call.id, call.payload or b"", fds)
        except (OSError, ValueError) as exc:  # no descriptor or memory left
            if call.options:  # they wait there for a call that will not come
                link.send(CANCEL, call.id, b"")
            self.calls.pop(call.id, None)
            if not call.done():
                self.answer(call, None, exc)
        else:
            self.sent(call)

    def sent(self, call: Call) -> None:
        """It is in the queue of the socket."""
        call.forget_request()

    def _send_backlog(self) -> None:
        link, backlog = self.link, self.backlog
        while backlog and link is not None and link.queued <= _UNSENT_MAX:
            call = backlog.popleft()
            if call.id in self.calls:
                self._queue(link, call)

    def _on_writable(self) -> None:
        link = self.link
        before = link.queued if link is not None else 0
        self._flush()
        if before and link is not None and self.link is link and link.queued == before:
            # Too many descriptors of this user in flight: the socket has room,
            # and says so all the time.
            assert self._watch is not None
            self._watch.write(False)
            self.loop.call_later(_BACK_OFF, self._flush)

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        link = self.link
        if link is None:
            return
        all_sent = True
        while not self._deaf:
            try:
                all_sent = link.flush()
            except OSError as exc:
                if exc.errno not in (errno.EPIPE, errno.ECONNRESET):
                    self._broken(exc)
                    return
                self._deaf = all_sent = True
            if not all_sent or not self.backlog:
                break
            self._send_backlog()
        if self._watch is not None:
            self._watch.write(not all_sent)
        if self.finishing and not self.calls:
            link.shutdown()

    def add_credit(self, id: int, n: int) -> None:
        """Let a stream go on."""
        if self.link is not None:
            self.link.send(CREDIT, id, _CREDIT.pack(n))
            self._flush_soon()

    def cancelled(self, call: Call) -> None:
        """Nobody wants the answer of a call any more."""
        if call.id not in self.calls:
            return
        if call.payload is not None or self.link is None:  # it has not been sent
            del self.calls[call.id]
            call.forget_request()
            self._after_answer(call)
        else:
            self.link.send(CANCEL, call.id, b"")
            self._flush_soon()

    # -- receiving

    def _on_readable(self) -> None:
        link = self.link
        if link is None:
            return
        try:
            frames = iter(link.receive())
        except OSError as exc:
            self._broken(exc)
            return
        calls = self.calls
        for kind, id, payload, fds in frames:
            call = calls.get(id)
            if kind == RESULT and call is not None:
                del calls[id]
                if call.done():  # cancelled
                    close_all(fds)
                    self._after_answer(call)
                    continue
                try:
                    value = self._decode(payload, fds)
                except KeyboardInterrupt:
                    raise
                except BaseException as exc:
                    self.answer(call, None, _undecodable(exc))
                else:
                    self.answer(call, value, None)
            elif not self._try_frame(kind, call, id, payload, fds):
                break
        for _, _, _, fds in frames:  # those behind a frame that made no sense
            close_all(fds)
        if self.link is not link:
            return
        if link.pending:
            self.loop.call_soon(self._on_readable)
        elif link.eof:
            self._on_eof()

    def _try_frame(
        self, kind: int, call: Call | None, id: int, payload: bytes, fds: Any
    ) -> bool:
        """Handle a frame that is not a result, or give the process up."""
        error = ProtocolError(f"an unexpected RPC frame of kind {kind}")
        try:
            if self._on_frame(kind, call, id, payload, fds):
                return True
            close_all(fds)
        except Exception as exc:  # what it should have in it is not there
            error.__cause__ = exc
        self._broken(error)
        return False

    def _on_frame(
        self, kind: int, call: Call | None, id: int, payload: bytes, fds: Any
    ) -> bool:
        """Handle a frame that is not a result; whether it made sense."""
        if kind == EVENT:
            self._on_event(call, id, payload, fds)
        elif kind == READY:
            self.ready = True
            self.on_ready()
        elif kind == RETIRE:
            self.on_retire()
        elif kind == ERROR and id == 0:
            self.error = decode_exception(payload, fds, self.codec)
        elif call is None:
            return self.link is None
        elif kind == ITEM and call.stream is not None:
            if call.done():
                close_all(fds)
            else:
                call.stream.feed(payload, fds)
        elif kind == STOP:
            del self.calls[id]
            self.answer(call, None, None)
        elif kind == ERROR:
            error = decode_exception(payload, fds, self.codec)
            del self.calls[id]
            self.answer(call, None, error)
        elif kind == OUTPUT:
            stdout, stderr, *cut = find_codec("bytes").decode(payload, fds)
            call.output = stdout, stderr, bool(cut)
        else:
            return False
        return True

    def _on_event(self, call: Call | None, id: int, payload: bytes, fds: Any) -> None:
        callback = call.on_event if call is not None else None
        callback = callback or self.on_event
        try:
            event = Event(id, tuple(self._decode(payload, fds)))
        except KeyboardInterrupt:
            raise
        except BaseException as exc:
            self.loop.call_exception_handler(
                {"message": "an event could not be decoded", "exception": exc}
            )
        else:
            if callback is not None:
                call_user(self.loop, callback, event)

    def answer(self, call: Call, value: Any, error: BaseException | None) -> None:
        """Complete a call, which is not among those without an answer any more."""
        call.connection = None
        if call.payload is not None:
            call.forget_request()
        if not call.done():
            if error is not None:
                if call.output is not None:
                    attach_output(error, call.output)
                call.set_exception(error)
            elif call.output is not None:
                call.set_result(Captured(value, *call.output))
            else:
                call.set_result(value)
            if call.stream is not None:
                call.stream.wake()
        self._after_answer(call)

    def _after_answer(self, call: Call) -> None:
        self.answered(call)
        if self.finishing and not self.calls:
            self._flush_soon()

    # -- what a pool adds

    def answered(self, call: Call) -> None:
        """A call has had its answer, or needs none any more."""

    def on_ready(self) -> None:
        """The process is initialised."""

    def on_retire(self) -> None:
        """The process wants no further calls."""

    # -- the end

    def finish(self) -> None:
        """End the process as soon as all calls have their answers."""
        self.finishing = True
        if self.link is not None and not self.calls:
            self._flush()

    def kill(self) -> None:
        """End the process now; calls without an answer are lost."""
        try:
            self.fork.kill()
        except ProcessLookupError:
            pass

    def close_link(self) -> None:
        link, self.link = self.link, None
        if link is not None:
            if self._watch is not None:
                self._watch.close()
                self._watch = None
            link.close()

    def _broken(self, error: BaseException) -> None:
        """The process sends nonsense, or we cannot go on with it."""
        if self.error is None:
            if isinstance(error, OSError) and error.errno == errno.EPROTO:
                error = ProtocolError(f"process {self.fork.pid} has sent garbage")
            elif isinstance(error, OSError) and error.errno == errno.EMFILE:
                error.add_note("afork: for what a process has sent, or its socket")
            self.error = error
        self.kill()
        self._over()

    def _on_eof(self) -> None:
        if self.calls or not self.finishing:
            self.kill()  # it answers no more, whatever it still does
        self._over()

    def _over(self) -> None:
        """Nothing more will come."""
        self.close_link()
        self.before_end()
        # Not by a task: a loop that is being torn down would not run it.
        self._when_exited(lambda: self._tell_ended)

    def _tell_ended(self) -> None:
        if not self.ended.done():
            self._tell(self.error)

    async def end(self, error: BaseException | None) -> None:
        """Wait for the process to end, then tell whoever has to know."""
        try:
            await self.fork.wait()
        except (WorkerLost, OSError, ProtocolError):
            pass  # its status is not known
        except Exception as exc:
            error = error or exc
        self._tell(error)

    def _tell(self, error: BaseException | None) -> None:
        """It has ended; why, if that is known."""
        if self.store is not None:
            self.store.find_output(self.calls)
            self.store.close()
            self.store = None
        if error is None and (self.calls or not self.finishing):
            error = self.lost_error()
        for relay in (self.stdout, self.stderr, self.logs):
            if relay is not None:  # it may call functions of the user's
                call_user(self.loop, relay.close)
        if error is None:
            error = ClosedError("the process has ended")
        self.error = error
        calls, self.calls = self.calls, {}
        for call in calls.values():
            self.answer(call, None, copy_error(error))
        if not self.ended.done():
            self.ended.set_result(None)
        self.on_end(error, bool(calls))

    def before_end(self) -> None:
        """The connection is closed; calls without an answer will get none."""

    def on_end(self, error: BaseException, told: bool) -> None:
        """The process has ended; whether calls were told the error."""

    def lost_error(self) -> WorkerLost:
        """What to say of a process that has died."""
        process = self.fork._process
        text = ""
        if self.stderr is not None:
            try:
                text = self.stderr.tail()
            except OSError:
                pass  # what it has died of is known all the same
        return WorkerLost(
            "the process has died", process.pid, process.status, stderr=text
        )


#: All of this process, for its own forked children.
_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _forget(callbacks: object) -> None:
    """In a forked child of the application: close, tell nobody, touch no loop."""
    for connection in list(_connections):
        if connection._watch is not None:
            connection._watch.abandon()
            connection._watch = None
        if connection.link is not None:
            connection.link.close()
            connection.link = None
        for relay in (connection.stdout, connection.stderr, connection.logs):
            if relay is not None:
                relay.abandon()
        if connection.store is not None:
            connection.store.close()
            connection.store = None
    _connections.clear()


_hub.forget_all.append(_forget)


def call_user(
    loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: object
) -> None:
    """Call a function of the user's; what it raises is its loop's affair."""
    try:
        callback(*args)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as exc:  # also what ends tasks: this is none
        loop.call_exception_handler(
            {"message": f"exception in {callback!r}", "exception": exc}
        )


def _undecodable(exc: BaseException) -> BaseException:
    """The error of a call whose result cannot be had here."""
    if not isinstance(exc, Exception) or isinstance(exc, StopIteration):
        # No future raises these.
        exc = RemoteError("decode", type(exc).__name__, str(exc))
    exc.add_note("afork: the result could not be decoded")
    return exc


def copy_error(error: BaseException) -> BaseException:
    """An exception of its own for each call: raising one changes it."""
    import copy

    try:
        new = copy.copy(error)
    except Exception:
        return error
    new.__cause__ = error.__cause__
    if hasattr(error, "__notes__"):
        new.__notes__ = list(error.__notes__)
    return new
