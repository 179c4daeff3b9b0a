"""One process as the application sees it: its socket, its reports, its end.

A :class:`Process` outlives the :class:`~afork.Fork` object that users hold:
the hub keeps it for as long as its socket has to be read, its template's for
as long as its exit status may still arrive.
"""

from __future__ import annotations

import copy
import errno
import functools
import logging
import os
import signal
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from . import _afork, _ending, _hub
from ._ending import Mortal
from ._errors import ProtocolError, RemoteError, TemplateError, WorkerLost
from ._hub import BACK_OFF, IN, OUT, hub
from ._reports import (
    EXITED,
    FAILED,
    PID_MAX,
    SPAWNED,
    STAGES,
    STARTED,
    TOKEN,
    check_pidfd,
    error_from,
)
from ._state import next_id

#: A letter, a payload, and a descriptor if there is one; or 0 and an errno.
_Report: TypeAlias = tuple[int, bytes, _afork.Descriptor | int | None]

#: So many ends of a quiet process's children may wait to be read.
_UNREAD = 32

logger = logging.getLogger("afork")


class Process(Mortal):
    """A process: its socket, what it reports, and when it is let go."""

    def poll(self) -> None:
        """Read the reports that are there."""
        if self.channel is not None:
            with hub().lock:
                self.unread = 0
                self._on_event(IN)

    # -- writing

    def watch(self) -> None:
        """Read its socket as reports come."""
        assert self.channel is not None
        hub().watch_process(self.channel, self)

    def flush(self) -> None:
        """Send what the socket takes; the rest as it takes it.

        Without a running loop there is nobody to send the rest, so this waits.
        """
        if self.coming:
            self._expect_socket()
            if self.coming:
                return
        channel = self.channel
        while (fd := self._flush_some()) >= 0:
            wait_for_room(fd, channel is not None and channel.crowded)

    def _flush_some(self) -> int:
        """Send what goes now; the descriptor to wait for, or -1."""
        shared = hub()
        with shared.lock:
            channel = self.channel
            if channel is None or self.gone:
                return -1
            try:
                if channel.flush():
                    if self.plain or self.released or self.error is not None:
                        self._flushed()
                elif shared.attach_any():
                    self._set_events()
                else:
                    return channel.fileno()
            except OSError as exc:
                if exc.errno not in (errno.EPIPE, errno.ECONNRESET):
                    raise
                self.broken = True
            return -1

    def request_many(self, children: list[Process]) -> None:
        """Queue the request for processes whose sockets are to come from us."""
        if self.channel is not None:
            ids = [child.id for child in children]
            self.channel.fork_many(struct.pack(f"={len(ids)}Q", *ids))
            for child in children:
                child.batch = ids[0]
        else:  # as late as if they had found the end of file
            hub().later(0, self._orphan_children)

    def _orphan_children(self) -> None:
        for child in list(self.children.values()):
            child._orphaned()
        self.children.clear()

    def _expect_socket(self) -> None:
        """See to it that somebody reads our socket; without a loop this waits."""
        while self.coming and not hub().attach_any():
            hub().wait(0.1)  # another thread may read it meanwhile

    def _attach(self, fd: int) -> None:
        assert self.channel is not None
        self.channel.attach(fd)
        self._has_come()
        self.watch()
        if self._flush_some() >= 0:
            self._set_events()
        self._wake()

    def _has_come(self) -> None:
        """Its socket is there, or not expected any more."""
        if self.coming:
            self.coming = False
            if self.parent is not None:
                self.parent._listen(-1)

    def is_settled(self) -> bool:
        """Whether nothing is queued, and no child's socket is to come."""
        queued = self.channel is not None and (self.coming or self.channel.queued)
        return not queued and not any(c.coming for c in self.children.values())

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
        channel.deliver(self)

    def _on_reports(self, reports: list[_Report]) -> None:
        channel = self.channel
        if self.reports is None:
            self.reports = deque()
        # What handles one of them may poll us: first what came first.
        self.reports.extend(reports)
        while self.reports:
            report = self.reports.popleft()
            if self.channel is channel:  # else the one before it has ended it all
                self._on_report(*report)
        if channel is not None and self.channel is channel and channel.eof:
            self._on_end()
        self._wake()

    def _on_entered(self, pid: int, pidfd: _afork.Descriptor | None) -> None:
        """Started and running at once: what nearly all starts consist of."""
        try:
            if (
                self.claimed != "run"
                or self.pid is not None
                or self.error is not None
                or self.signals
                or self.exited
                or not 0 < pid <= PID_MAX
                or pidfd is None
            ):
                raise ValueError
            if not self.dropped:
                check_pidfd(pidfd.fileno())
        except ValueError:
            started = _afork.REP_STARTED if pidfd else _afork.REP_STARTED_BARE
            self._on_reports(
                [(started, STARTED.pack(pid), pidfd), (_afork.REP_RUNNING, b"", None)]
            )
            return
        if not self.dropped:  # else nobody can ask for a signal any more
            self.pidfd = pidfd.detach()
        self.pid = pid
        self._take_socket()
        self._wake()

    def _on_report(
        self, letter: int, payload: bytes, fd: _afork.Descriptor | int | None
    ) -> None:
        try:
            if isinstance(fd, int):
                self._broken(os.strerror(-fd))
                return
            if letter == _afork.REP_STARTED or letter == _afork.REP_STARTED_BARE:
                self._on_started(STARTED.unpack(payload)[0], fd)
            elif letter == _afork.REP_RUNNING:
                if self.claimed != "run" or self.error is not None:
                    raise ValueError("running without having been asked to")
                self._on_running()
            elif letter == _afork.REP_EXITED:
                id, _pid, status, *usage = EXITED.unpack(payload)
                os.waitstatus_to_exitcode(max(status, 0))  # ValueError if it is none
                child = self.children.pop(id, None)
                if child is not None:
                    child.on_exited(None if status == -1 else status, tuple(usage))
            elif letter == _afork.REP_DONE:
                token = TOKEN.unpack(payload[: TOKEN.size])[0]
                if payload[TOKEN.size :] == b"\1":
                    self.warm = max(self.warm, token)
                elif len(payload) > TOKEN.size:
                    raise ValueError("malformed DONE")
                else:
                    self.done = max(self.done, token)
            elif letter == _afork.REP_ERROR:
                self.fail(error_from(payload))
            elif letter == _afork.REP_STATS:
                token = TOKEN.unpack(payload[:8])[0]
                if self.stats is None:
                    raise ValueError("an answer that nobody has asked for")
                if token in self.stats:  # else its await was cancelled
                    self.stats[token] = payload[8:]
            elif letter == _afork.REP_SOCKET:
                self._on_socket(TOKEN.unpack(payload)[0], fd)
            elif letter == _afork.REP_FAILED:
                self._on_failed(*FAILED.unpack(payload))
            elif letter in (_afork.REP_SPAWNED, _afork.REP_SPAWNED_BARE):
                id, pid = SPAWNED.unpack(payload)
                child = self.children.get(id)
                if child is not None and not child.names:
                    raise ValueError("a program that nobody has asked for")
                if child is not None:
                    child._on_started(pid, fd)
                    child.executed = True
                    child._deliver_queued()
                    child._wake()
            else:
                self._broken(f"unknown report {letter}")
        except (struct.error, ValueError, OverflowError) as exc:
            self._broken(str(exc))

    def _broken(self, why: str) -> None:
        self.fail(ProtocolError(f"process {self.pid or '?'} sent nonsense: {why}"))
        if self.direct:
            self.deliver(signal.SIGKILL)  # who knows what it is by now
        self._on_end()

    def _on_started(self, pid: int, fd: _afork.Descriptor | None) -> None:
        if not 0 < pid <= PID_MAX:
            raise ValueError(f"{pid} is no process id")
        if fd is not None:
            check_pidfd(fd.fileno())
        if self.pid is None:  # what we know of our own child is not for it to say
            self.pid = pid
        if self.pidfd < 0 and not self.exited and fd is not None:
            self.pidfd = fd.detach()
        elif self.pidfd < 0 and not self.exited:
            try:
                self._open_pidfd()
            except OSError:
                pass  # perhaps when it is needed
        self._deliver_queued()
        self._drop_pidfd()

    def _on_running(self) -> None:
        self._take_socket()
        self._deliver_queued()
        self._drop_pidfd()

    def _take_socket(self) -> None:
        """The function is entered: the socket is the user's."""
        assert self.channel is not None
        self.running = True
        hub().unwatch(self.channel.fileno())
        fd = self.channel.detach()
        self.channel = None
        if self.forgotten and self.callback is None:
            os.close(fd)
        elif self.callback is not None:
            callback, self.callback = self.callback, None
            call_user(callback, stream_socket(fd))
        else:
            self.held = fd
        self.part()
        if self.parent is not None and self.parent.gone and not self.exited:
            self._learn_end()

    def refuse(self, error: BaseException) -> None:
        """There will be no such process."""
        self.unused = self.channel is not None and not self.channel.queued
        self.fail(error)
        self.on_exited(None, None)
        self._on_end()  # what was asked of it will not be, either

    def _on_socket(self, id: int, fd: _afork.Descriptor | None) -> None:
        child = self.children.get(id)
        if child is None or not child.coming:
            return  # it has been closed before it came
        if fd is None:
            self._on_failed(id, errno.EMFILE, 0)  # no descriptor was left for it
        else:
            try:
                child._attach(fd.detach())
            except OSError as exc:
                self._broken(f"a descriptor that is no process's socket: {exc}")

    def _on_failed(self, id: int, number: int, stage: int) -> None:
        child = self.children.pop(id, None)
        if child is None:
            return
        name = child.names[stage] if stage < len(child.names) else ""
        error: BaseException
        error = OSError(number, os.strerror(number), *([name] if name else []))
        what = STAGES[stage] if stage < len(STAGES) else ""
        error.add_note(f"afork: {what or 'start'} failed in the template")
        if number == errno.ECANCELED and self.error is not None:
            error = TemplateError("the template has failed before", self.pid)
            error.__cause__ = self.error
        child.refuse(error)

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
        self._orphan_children()
        self._wake()

    def _orphaned(self) -> None:
        """Its template has gone: nobody reports its end any more."""
        if self.exited:
            return
        if self.coming:
            self._on_end()
        if self.channel is not None:
            return  # its own socket has the rest, perhaps its start
        if not (self.running or self.executed or self.released or self.gone):
            self._lose()  # a program that was never started
        self._learn_end()

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
                hub().later(_ending.GRACE, self._settle)
        else:
            self.when_exited(self._settle)
            hub().later(_ending.GRACE, self._settle)

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
        told = self.pid or "(not started)", self.error
        hub().lock.after(
            functools.partial(logger.error, "process %s failed: %s", *told)
        )

    def told(self) -> None:
        """Somebody has this error, so that the log need not have it.

        Nor its template's, if that is where it comes from.
        """
        self.was_logged = True
        error, parent = self.error, self.parent
        if error is None or parent is None:
            return
        if parent.quiet:
            parent.poll()
        if parent.error is None:
            if parent.gone and isinstance(error, TemplateError):
                parent.told()  # its own is yet to come, and says the same
            return
        if parent.error is error.__cause__ or (
            type(parent.error) is type(error) and parent.error.args == error.args
        ):
            parent.told()

    def raise_error(self) -> None:
        if self.error is not None:
            self.told()
            self.close_held()  # for the streams of a failed exec
            # A copy: with the traceback that raising gives it, the original
            # would keep the caller's frame, and so its Fork, for ever.
            error = copy.copy(self.error)
            error.__cause__ = self.error.__cause__
            raise error

    # -- letting go

    def kill(self) -> None:
        """End it whatever it does; nobody waits for it any more."""
        self.forgotten = True
        self.was_logged = True
        self.callback = None
        try:
            self.send_signal(signal.SIGKILL)
        except OSError:
            pass  # it has ended, or there is no descriptor to reach it by
        with hub().lock:  # another thread may be about to store one
            self.close_held()

    def take_held(self) -> socket.socket | None:
        """Our end of the user's socket, for who has awaited it."""
        fd, self.held = self.held, -1
        return None if fd < 0 else stream_socket(fd)

    def close_held(self) -> None:
        """Nobody will take it."""
        fd, self.held = self.held, -1
        if fd >= 0:
            os.close(fd)

    def forget(self) -> None:
        """Nobody will await run or exec: configure and forget."""
        hub().attach_any()  # somebody has to read until it runs
        with hub().lock:
            self.forgotten = True
            self.close_held()
            self.part()
        self.log_error()

    def drop(self) -> None:
        """The Fork object has gone."""
        self.dropped = True
        if not self.claimed:  # else who awaits, or drops, the Run has done so
            hub().attach_any()  # somebody has to read until the end
            # Nor is it news that it has gone with its template.
            parent = self.parent
            known = parent is not None and parent.was_logged and parent.gone
            if not self.unused and not (known and self.pid is None):
                self.log_error()
            self.release()
        with hub().lock:
            self._drop_pidfd()
            self.part()

    def part(self) -> None:
        """If nobody can ask how it ends any more, its template need not say."""
        if (
            self.dropped
            and self.running
            and self.held < 0
            and self.parent is not None
            and not self._expecting
        ):
            self.parent.children.pop(self.id, None)

    def release(self) -> None:
        """End it as soon as everything queued has been sent."""
        if self.released or self.claimed:
            return
        self.released = True
        if self.coming and self.channel is not None and not self.channel.queued:
            self._close()  # it will find the end of file at once
        self.flush()

    def _close(self) -> None:
        channel, self.channel = self.channel, None
        self._has_come()
        if channel is not None:
            hub().unwatch(channel.fileno())
            channel.close()

    def abandon(self) -> None:
        """In a forked child of the application: close, tell nobody."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        self.reports = None
        self.close_held()
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


def fork_process(parent: Process) -> Process:
    """Queue one fork and send it."""
    channel = parent.channel
    if channel is None:
        channel = _afork.Channel(dead_end(), parent.plain)
    id = next_id()
    shared = hub()
    with shared.lock:
        request = channel.fork(id)
        child = Process(request, id, parent, parent.plain)
        shared.watch_process(request, child)
        parent.children[id] = child
        parent.forked = True
        parent.unread += 1
        if parent.quiet:
            if parent.unread > _UNREAD:
                parent.poll()
        elif parent.pid is not None and not parent.plain:
            parent.be_quiet()
    parent.flush()
    return child


def fork_processes(parent: Process, n: int) -> list[Process]:
    """Queue n forks as one request and send it.

    Their sockets come from the template, so that neither the loop nor the
    table of descriptors has to take all of them at once. What is configured
    meanwhile is queued.
    """
    if parent.plain or n < 2:
        return [fork_process(parent) for _ in range(n)]
    with hub().lock:
        ids = [next_id() for _ in range(n)]
        children = []
        for id in ids:
            child = Process(_afork.Channel(-1), id, parent)
            child.coming = True
            children.append(child)
        parent.children.update(zip(ids, children, strict=True))
        parent.forked = True
        parent._listen(n)
        parent.request_many(children)
    parent.flush()
    return children


#: What to do first when a template has ended (the default one is replaced).
on_template_end: dict[Process, Callable[[Process], None]] = {}


def call_user(callback: Callable[[socket.socket], object], sock: socket.socket) -> None:
    """Call back from a loop if one runs here, so that it reports exceptions."""
    import asyncio

    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        hub().lock.after(functools.partial(callback, sock))
    else:
        loop.call_soon(callback, sock)


def stream_socket(fd: int) -> socket.socket:
    """A non-blocking socket that owns a descriptor."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
    sock.setblocking(False)
    return sock


def wait_for_room(fd: int, crowded: bool) -> None:
    """Wait until a socket is worth another try."""
    import select

    poll = select.poll()
    poll.register(fd, 0 if crowded else select.POLLOUT)
    poll.poll(BACK_OFF * 1000 if crowded else None)


def peer_has_closed(fd: int) -> bool:
    """Whether end of file is what is left to read."""
    import select

    poll = select.poll()
    poll.register(fd, select.POLLHUP | select.POLLRDHUP)
    return bool(poll.poll(0))


def _forget_all(owners: list[object]) -> None:
    on_template_end.clear()
    for owner in owners:
        process = getattr(owner, "__self__", owner)  # a callback is a method
        if isinstance(process, Process):
            process.abandon()


_hub.forget_all.append(_forget_all)
