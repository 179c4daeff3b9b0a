"""One process as the application sees it: its socket, its reports, its end.

A :class:`Process` outlives the :class:`~afork.Fork` object that users hold:
the hub keeps it for as long as its socket has to be read, its template's for
as long as its exit status may still arrive.
"""

from __future__ import annotations

import copy
import errno
import itertools
import logging
import os
import signal
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import _afork, _hub
from ._errors import ProtocolError, RemoteError, TemplateError, WorkerLost
from ._hub import HUP, IN, OUT, hub, wake

if TYPE_CHECKING:
    import asyncio
    import resource

logger = logging.getLogger("afork")

#: Seconds that a report about a process may come later than its end.
GRACE = 1.0

_ids = itertools.count(1)
_EXITED = struct.Struct("=QIi18q")
_STARTED = struct.Struct("=I")
_SPAWNED = struct.Struct("=QI")
_FAILED = struct.Struct("=QiB")
_TOKEN = struct.Struct("=Q")
_STAGES = ("", "fork", "setup", "cwd", "exec")


def next_id() -> int:
    """A number for a process or a request, unique in this application."""
    return next(_ids)


class Process:
    """A process: what it has reported, and who waits to hear of it."""

    # Defaults are the class's: most processes never leave most of them.

    pid: int | None = None
    pidfd = -1  # owned
    #: Whether it is our child, and ours to reap.
    direct = False
    #: The function is entered.
    running = False
    #: It is a program by now.
    executed = False
    #: Our end of the socket once run has taken it over; owned until given.
    sock: socket.socket | None = None
    error: BaseException | None = None
    was_logged = False
    #: Highest token of a ready request that was answered.
    done = 0
    #: Nothing can be written any more; what explains it may be readable.
    broken = False
    #: Its socket has come to an end.
    gone = False
    #: Its end is known, or will not be known any more (status None).
    exited = False
    status: int | None = None
    usage: tuple[int, ...] | None = None
    #: It has made processes of its own.
    forked = False
    #: "run", "exec" or "to_fh" once it was asked to become something.
    claimed = ""
    #: Nobody will await what it was asked to become.
    forgotten = False
    #: No Fork object refers to it any more.
    dropped = False
    #: Its end has been asked for.
    released = False
    #: What to call with our end of the socket.
    callback: Callable[[socket.socket], object] | None = None
    #: Names for the message of a failed start, by its stage.
    names: tuple[str, ...] = ()
    #: It was moved to another template once.
    moved = False
    #: Its reports are read when somebody asks, not as they come.
    quiet = False
    _listeners = 0
    _expecting = False
    _losing = False
    _watching_exit = False

    def __init__(
        self,
        channel: _afork.Channel | None,
        *,
        id: int = 0,
        parent: Process | None = None,
        plain: bool = False,
    ) -> None:
        self.id = id
        self.channel = channel
        self.plain = plain
        self.parent = parent
        #: Processes whose exit this one will report, by id.
        self.children: dict[int, Process] = {}
        #: Signals to be sent once it has started.
        self.signals: list[int] = []
        #: Descriptors among the pending arguments.
        self.handles: int = parent.handles if parent else 0
        #: It was forked from the main program.
        self.has_main: bool = parent.has_main if parent else False
        #: The sys.path that it has been told.
        self.path: list[str] = parent.path if parent else []
        self._waiters: list[asyncio.Future[None]] = []
        self._exit_callbacks: list[Callable[[], None]] = []
        if channel is not None:
            hub().watch(channel.fileno(), self._on_event)

    # -- waiting

    async def until(self, happened: Callable[[], bool]) -> None:
        """Wait until a report has made the predicate true."""
        loop = hub().attach()
        # Another thread's loop may read the report between any two steps.
        lock = hub().lock
        with lock:
            self._listen(1)
        try:
            while True:
                with lock:
                    if happened():
                        return
                    future = loop.create_future()
                    self._waiters.append(future)
                try:
                    await future
                finally:
                    with lock:
                        if future in self._waiters:
                            self._waiters.remove(future)
        finally:
            with lock:
                self._listen(-1)

    def _wake(self) -> None:
        if self._waiters:
            waiters, self._waiters = self._waiters, []
            for future in waiters:
                wake(future)

    # -- listening

    def be_quiet(self) -> None:
        """Do not wake a loop for every child that exits.

        For the default template: most of its children are of no interest to
        anybody once they run. Its end is noticed at once all the same.
        """
        self.quiet = True
        self._set_events()

    def _listen(self, more: int) -> None:
        before = self._listeners
        self._listeners += more
        if self.quiet and bool(before) != bool(self._listeners):
            self._set_events()

    def _set_events(self) -> None:
        channel = self.channel
        if channel is not None:
            events = 0 if self.quiet and not self._listeners else IN
            if channel.queued and not self.broken:
                events |= OUT
            hub().change(channel.fileno(), events)

    def adopt(self, child: Process) -> None:
        """Be the one who reports the child's end from now on."""
        child.parent = self
        self.children[child.id] = child
        self.forked = True
        if child._expecting:
            self._listen(1)

    def expect_exit(self) -> None:
        """Somebody wants to know when it ends."""
        if not self._expecting and not self.exited:
            self._expecting = True
            if self.parent is not None:
                self.parent._listen(1)

    def poll(self) -> None:
        """Read the reports that are there."""
        if self.channel is not None:
            with hub().lock:
                self._on_event(IN)

    # -- writing

    def flush(self) -> None:
        """Send what the socket takes; the rest as it takes it.

        Without a running loop there is nobody to send the rest, so this waits.
        """
        while (fd := self._flush_some()) >= 0:
            select_writable(fd)

    def _flush_some(self) -> int:
        """Send what goes now; the descriptor to wait for, or -1."""
        with hub().lock:
            channel = self.channel
            if channel is None or self.gone:
                return -1
            try:
                if channel.flush():
                    self._flushed()
                elif hub().attach_any():
                    self._set_events()
                else:
                    return channel.fileno()
            except OSError as exc:
                if exc.errno not in (errno.EPIPE, errno.ECONNRESET):
                    raise
                self.broken = True
            return -1

    def _flushed(self) -> None:
        # What has failed and was to become something is of no use any more.
        over = self.released or (self.claimed and self.error is not None)
        if self.channel is None:
            return
        if over:
            if self.plain:
                self._close()
            else:
                self.channel.shutdown()
        elif self.plain and self.claimed and not self.running:
            self._on_running()

    # -- reading

    def _on_event(self, events: int) -> None:
        channel = self.channel
        if channel is None:
            return
        if events & OUT:
            self.flush()
            if self.channel is not channel:
                self._wake()
                return
            self._set_events()
        if self.plain:
            # Before run, a plain process has nothing to say but its end; after
            # it what can be read is the user's.
            if events & ~OUT and not self.running and peer_has_closed(channel.fileno()):
                self._on_end()
            self._wake()
            return
        for letter, payload, fd in channel.receive():
            if self.channel is channel:
                self._on_report(letter, payload, fd)
            elif fd >= 0:
                os.close(fd)  # the report before it ended the conversation
        if self.channel is channel and channel.eof:
            self._on_end()
        self._wake()

    def _on_report(self, letter: int, payload: bytes, fd: int) -> None:
        try:
            if letter == _afork.REP_STARTED or letter == _afork.REP_STARTED_BARE:
                self._on_started(_STARTED.unpack(payload)[0], fd)
            elif letter == _afork.REP_RUNNING:
                if self.claimed != "run" or self.error is not None:
                    raise ValueError("running without having been asked to")
                self._on_running()
            elif letter == _afork.REP_EXITED:
                id, _pid, status, *usage = _EXITED.unpack(payload)
                os.waitstatus_to_exitcode(max(status, 0))  # ValueError if it is none
                child = self.children.pop(id, None)
                if child is not None:
                    child.on_exited(None if status == -1 else status, tuple(usage))
            elif letter == _afork.REP_DONE:
                self.done = max(self.done, _TOKEN.unpack(payload)[0])
            elif letter == _afork.REP_ERROR:
                self.fail(error_from(payload))
            elif letter == _afork.REP_FAILED:
                self._on_failed(*_FAILED.unpack(payload))
            elif letter in (_afork.REP_SPAWNED, _afork.REP_SPAWNED_BARE):
                id, pid = _SPAWNED.unpack(payload)
                child = self.children.get(id)
                if child is not None and not child.names:
                    raise ValueError("a program that nobody has asked for")
                if child is not None:
                    child._on_started(pid, fd)
                    child.executed = True
                    child._deliver_queued()
                    child._wake()
                elif fd >= 0:
                    os.close(fd)
            else:
                self._broken(f"unknown report {letter}" if letter else os.strerror(-fd))
        except (struct.error, ValueError, OverflowError) as exc:
            if fd >= 0:
                os.close(fd)
            self._broken(str(exc))

    def _broken(self, why: str) -> None:
        self.fail(ProtocolError(f"process {self.pid or '?'} sent nonsense: {why}"))
        if self.direct:
            self.deliver(signal.SIGKILL)  # who knows what it is by now
        self._on_end()

    def _on_started(self, pid: int, fd: int) -> None:
        if not 0 < pid <= 1 << 22:  # PID_MAX_LIMIT
            raise ValueError(f"{pid} is no process id")
        if fd >= 0:
            check_pidfd(fd)
        if self.pid is None:  # what we know of our own child is not for it to say
            self.pid = pid
        if self.pidfd >= 0 or self.exited:
            if fd >= 0:
                os.close(fd)
        elif fd >= 0:
            self.pidfd = fd
        else:
            try:
                self._open_pidfd()
            except OSError:
                pass  # perhaps when it is needed
        self._deliver_queued()
        self._drop_pidfd()

    def _open_pidfd(self) -> None:
        """Make what could not be made or received when it started.

        Its number is still its own if our template is the parent of whoever
        has it, and has not reported the end of this one.
        """
        if self.pid is None or self.parent is None or self.parent.gone:
            return
        fd = os.pidfd_open(self.pid)
        try:
            with open(f"/proc/{self.pid}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
            if parent == self.parent.pid:
                self.parent.poll()
                if not self.exited and self.pidfd < 0:
                    self.pidfd, fd = fd, -1
        finally:
            if fd >= 0:
                os.close(fd)

    def _on_running(self) -> None:
        assert self.channel is not None
        self.running = True
        fd = self.channel.fileno()
        hub().unwatch(fd)
        self.channel.detach()
        self.channel = None
        if self.forgotten and self.callback is None:
            os.close(fd)
        else:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
            self.sock.setblocking(False)
            if self.callback is not None:
                callback, self.callback = self.callback, None
                sock, self.sock = self.sock, None
                call_user(callback, sock)
        self._deliver_queued()
        self._drop_pidfd()
        if self.parent is not None and self.parent.gone and not self.exited:
            self._learn_end()

    def _on_failed(self, id: int, number: int, stage: int) -> None:
        child = self.children.pop(id, None)
        if child is None:
            return
        name = child.names[stage] if stage < len(child.names) else ""
        error: BaseException
        error = OSError(number, os.strerror(number), *([name] if name else []))
        what = _STAGES[stage] if stage < len(_STAGES) else ""
        error.add_note(f"afork: {what or 'start'} failed in the template")
        if number == errno.ECANCELED and self.error is not None:
            error = TemplateError("the template has failed before", self.pid)
            error.__cause__ = self.error
        child.exited = True
        child.fail(error)
        child._close()

    # -- the end

    def _on_end(self) -> None:
        """The socket has ended: the process is gone, or a program by now."""
        if self.gone:
            return
        self.gone = True
        replace = on_template_end.get(self)
        if replace is not None:
            replace(self)
        self._close()
        if self.claimed == "exec" and self.pid is not None and self.error is None:
            self.executed = True
            self._deliver_queued()
        elif self.error is None and not self.released:
            self._lose()
        if self.direct:
            self._watch_exit()
            self._on_pidfd(IN)
        elif self.parent is None or self.parent.gone:
            self._learn_end()
        elif self.pid is None and self.error is not None:
            # The template's answer to a fork that failed: no exit will follow.
            self.parent.children.pop(self.id, None)
            self.on_exited(None, None)
        for child in list(self.children.values()):
            child._orphaned()
        self.children.clear()
        self._wake()

    def _orphaned(self) -> None:
        """Its template has gone: nobody reports its end any more."""
        if self.exited:
            return
        if self.channel is not None:
            return  # its own socket has the rest, perhaps its start
        if not self.running and not self.executed:
            self._lose()  # a program that was never started
        self._learn_end()

    def _learn_end(self) -> None:
        if self.pidfd >= 0:
            self._watch_exit()
        else:
            self.on_exited(None, None)

    def _lose(self) -> None:
        """It ended early. Why is known with its status, or its template's."""
        if self._losing or self.error is not None:
            return
        self._losing = True
        parent = self.parent
        if self.exited and self.status is not None:
            self._settle()
        elif parent is not None and parent.gone and not parent.released:
            if parent.exited:
                self._settle()
            else:
                parent.when_exited(self._settle)
                hub().later(GRACE, self._settle)
        else:
            self.when_exited(self._settle)
            hub().later(GRACE, self._settle)

    def _settle(self) -> None:
        if self.error is not None or self.executed:
            return
        parent = self.parent
        if (
            self.status is None
            and parent is not None
            and parent.gone
            and (parent.error is not None or not parent.released)
        ):
            if self.pid is None and isinstance(parent.error, (OSError, RemoteError)):
                error: BaseException = parent.error  # it has never been there
            else:
                error = TemplateError(
                    "the template has died", parent.pid, parent.status
                )
                error.__cause__ = parent.error
        elif self.direct and self.pid is not None:
            error = TemplateError("the process has died", self.pid, self.status)
        else:
            error = WorkerLost("the process has died", self.pid, self.status)
        self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Everything that waits for this process, now or later, gets the error."""
        if self.error is None:
            self.error = error
        if self.forgotten or (self.dropped and not self.claimed):
            self.log_error()
        self._flushed()
        self._wake()

    def log_error(self) -> None:
        """Tell the logger, once, what nobody is going to await."""
        if self.error is None or self.was_logged:
            return
        self.was_logged = True
        logger.error("process %s failed: %s", self.pid or "(not started)", self.error)

    def told(self) -> None:
        """Somebody has this error, so that the log need not have it.

        Nor its template's, if that is where it comes from.
        """
        self.was_logged = True
        error, parent = self.error, self.parent
        if error is None or parent is None or parent.error is None:
            return
        if parent.error is error.__cause__ or (
            type(parent.error) is type(error) and parent.error.args == error.args
        ):
            parent.told()

    def raise_error(self) -> None:
        if self.error is not None:
            self.told()
            if self.sock is not None:  # for the streams of a failed exec
                self.sock.close()
                self.sock = None
            # A copy: with the traceback that raising gives it, the original
            # would keep the caller's frame, and so its Fork, for ever.
            error = copy.copy(self.error)
            error.__cause__ = self.error.__cause__
            raise error

    def on_exited(self, status: int | None, usage: tuple[int, ...] | None) -> None:
        """Its wait status is known, or (None) can never be."""
        if self.exited:
            return
        self.exited = True
        self.status = status
        self.usage = usage
        if self._expecting and self.parent is not None:
            self.parent._listen(-1)
        if self.pidfd >= 0:
            hub().unwatch(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1
        callbacks, self._exit_callbacks = self._exit_callbacks, []
        for callback in callbacks:
            callback()
        self._wake()

    def when_exited(self, callback: Callable[[], None]) -> None:
        """Call back once its end is known; at once if it is."""
        if self.exited:
            callback()
        else:
            self._exit_callbacks.append(callback)
            self.expect_exit()

    def watch_exit(self) -> None:
        """Learn of the end from the pidfd, should no report come."""
        with hub().lock:
            self.expect_exit()
            if not self.exited:
                self._watch_exit()

    def _watch_exit(self) -> None:
        if self._watching_exit or self.pidfd < 0:
            return
        self._watching_exit = True
        hub().watch(self.pidfd, self._on_pidfd)

    def _on_pidfd(self, events: int) -> None:
        if self.exited or self.pidfd < 0:
            return
        if self.direct:
            assert self.pid is not None
            try:
                pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            except ChildProcessError:  # somebody waited for -1
                self.on_exited(_afork.exit_status(self.pidfd), None)
                return
            if pid:
                self.on_exited(status, usage_fields(usage))
            return
        if self.parent is not None and not self.parent.gone:
            hub().unwatch(self.pidfd)
            hub().later(GRACE, self._exit_by_pidfd)
        elif events & HUP:  # reaped: from here on the kernel tells its status
            self._exit_by_pidfd()
        else:
            hub().change(self.pidfd, 0)
            hub().later(GRACE, self._exit_by_pidfd)

    def _exit_by_pidfd(self) -> None:
        if not self.exited and self.pidfd >= 0:
            self.on_exited(_afork.exit_status(self.pidfd), None)

    def _drop_pidfd(self) -> None:
        """Close it once nobody can ask for a signal or a status any more."""
        useless = self.running or self.executed or self.released or self.gone
        if (
            self.dropped
            and (useless or self.claimed == "to_fh")
            and not self.direct
            and not self._watching_exit
            and self.pidfd >= 0
        ):
            os.close(self.pidfd)
            self.pidfd = -1

    # -- signals

    def send_signal(self, number: int) -> None:
        """Now, or as soon as the process has reported its start."""
        with hub().lock:
            if self.exited or (self.gone and self.pidfd < 0):
                raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
            if number == signal.SIGKILL:
                self.was_logged = True  # its end is no news
            if self.pidfd < 0:
                self._open_pidfd()
            # Until it has become what it was asked to, it swallows signals.
            becoming = self.claimed and not (self.running or self.executed)
            if self.pid is None or (becoming and number != signal.SIGKILL):
                self.signals.append(number)
            elif self.pidfd >= 0:
                self.deliver(number)
            else:
                raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))

    def _deliver_queued(self) -> None:
        signals, self.signals = self.signals, []
        for number in signals:
            try:
                self.send_signal(number)
            except ProcessLookupError:
                pass  # it has just ended; its status tells

    def deliver(self, number: int) -> None:
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except OSError:
            pass  # it has just ended; its status tells

    def kill(self) -> None:
        """End it whatever it does; nobody waits for it any more."""
        self.forgotten = True
        self.was_logged = True
        self.callback = None
        try:
            self.send_signal(signal.SIGKILL)
        except OSError:
            pass  # it has ended, or there is no descriptor to reach it by
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    # -- letting go

    def forget(self) -> None:
        """Nobody will await run or exec: configure and forget."""
        hub().attach_any()  # somebody has to read until it runs
        with hub().lock:
            self.forgotten = True
            if self.sock is not None:
                self.sock.close()
                self.sock = None
        self.log_error()

    def drop(self) -> None:
        """The Fork object has gone."""
        self.dropped = True
        hub().attach_any()  # somebody has to read until the end
        if not self.claimed:
            self.log_error()
            self.release()
        with hub().lock:
            self._drop_pidfd()

    def release(self) -> None:
        """End it as soon as everything queued has been sent."""
        if self.released or self.claimed:
            return
        self.released = True
        self.flush()

    def _close(self) -> None:
        channel, self.channel = self.channel, None
        if channel is not None:
            hub().unwatch(channel.fileno())
            channel.close()

    def abandon(self) -> None:
        """In a forked child of the application: close, tell nobody."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        self.gone = self.exited = True
        self.error = TemplateError("this process belongs to the one that forked us")
        self.was_logged = True
        for child in self.children.values():
            child.abandon()
        self.children.clear()


def dead_end() -> int:
    """One end of a socket whose other end is closed: what is sent is lost."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    theirs.close()
    return ours.detach()


#: Fork requests after which what is queued is sent: each holds a descriptor.
_BATCH = 64


def fork_process(parent: Process) -> Process:
    """Queue one fork and send it."""
    child = _queue_fork(parent)
    parent.flush()
    return child


def fork_processes(parent: Process, n: int) -> list[Process]:
    """Queue n forks and send them."""
    children: list[Process] = []
    try:
        for i in range(n):
            children.append(_queue_fork(parent))
            if i % _BATCH == 0:
                parent.flush()
    except OSError:  # all or none
        for child in children:
            child.drop()
        raise
    parent.flush()
    return children


def _queue_fork(parent: Process) -> Process:
    channel = parent.channel
    if channel is None:
        channel = _afork.Channel(dead_end(), parent.plain)
    id = next_id()
    with hub().lock:
        child = Process(channel.fork(id), id=id, parent=parent, plain=parent.plain)
        parent.children[id] = child
        parent.forked = True
    return child


#: What to do first when a template has ended (the default one is replaced).
on_template_end: dict[Process, Callable[[Process], None]] = {}


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


def call_user(callback: Callable[[socket.socket], object], sock: socket.socket) -> None:
    """Call back from a loop if one runs here, so that it reports exceptions."""
    import asyncio

    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        callback(sock)
    else:
        loop.call_soon(callback, sock)


def check_pidfd(fd: int) -> None:
    """ValueError unless it is one: the peer may have sent anything."""
    try:
        signal.pidfd_send_signal(fd, 0)
    except (ProcessLookupError, PermissionError):
        pass
    except OSError as exc:
        raise ValueError("a descriptor that is no pidfd") from exc


def select_writable(fd: int) -> None:
    import select

    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()


def peer_has_closed(fd: int) -> bool:
    """Whether end of file is what is left to read."""
    import select

    poll = select.poll()
    poll.register(fd, select.POLLHUP | select.POLLRDHUP)
    return bool(poll.poll(0))


def _forget_all(callbacks: list[_hub.Callback]) -> None:
    on_template_end.clear()
    for callback in callbacks:
        owner = getattr(callback, "__self__", None)
        if isinstance(owner, Process):
            owner.abandon()


_hub.forget_all.append(_forget_all)
