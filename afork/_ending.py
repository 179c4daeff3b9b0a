"""How a process is reached by signals, and how its end becomes known.

A process is known by its pidfd, never by its number alone. Its status comes
from whoever is its parent: from its template in a report, from us for our own
children, and in the last resort from the kernel.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable

from . import _afork
from ._hub import HUP, hub
from ._reports import usage_fields
from ._state import State

#: Seconds that a report about a process may come later than its end.
GRACE = 1.0

#: Seconds until a descriptor is tried again that could not be had.
_AGAIN = 0.05


class Mortal(State):
    """The part of a process that is concerned with its end."""

    # -- the end

    def expect_exit(self) -> None:
        """Somebody wants to know when it ends."""
        if not self._expecting and not self.exited:
            self._expecting = True
            if self.parent is not None:
                self.parent._listen(1)

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
        callbacks, self._exit_callbacks = self._exit_callbacks, ()
        for callback in callbacks:
            callback()
        self._wake()

    def ask_parent(self) -> None:
        """Read what a quiet parent has to say of our end, perhaps."""
        parent = self.parent
        if parent is not None and parent.quiet and not self.exited:
            parent.poll()

    def when_exited(self, callback: Callable[[], None]) -> None:
        """Call back once its end is known; at once if it is."""
        if self.exited:
            callback()
        else:
            self._exit_callbacks = (*self._exit_callbacks, callback)
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

    def _learn_end(self) -> None:
        if self.pidfd >= 0:
            self._watch_exit()
        else:
            self.on_exited(None, None)

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
        """Now, or as soon as the process has reported its start.

        Later, if the descriptor that it is reached by was lost when there was
        none left, and there is still none; without a loop that is an OSError.
        """
        if not 0 <= number < signal.NSIG:  # before it is queued
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        with hub().lock:
            self.ask_parent()
            if self.exited or (self.gone and self.pidfd < 0):
                raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
            if number == signal.SIGKILL:
                self.was_logged = True  # its end is no news
            late = False
            if self.pidfd < 0:
                try:
                    self._open_pidfd()
                except ProcessLookupError:
                    raise
                except OSError:  # no descriptor is left to reach it by
                    late = hub().attach_any()
                    if not late:
                        raise
            # Until it has become what it was asked to, it swallows signals.
            becoming = self.claimed and not (self.running or self.executed)
            if late or self.pid is None or (becoming and number != signal.SIGKILL):
                self.signals = (*self.signals, number)
                if late and not self._signals_late:
                    self._signals_late = True
                    hub().later(_AGAIN, self._deliver_late)
            elif self.pidfd >= 0:
                self.deliver(number)
            else:
                raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))

    def _deliver_queued(self) -> None:
        signals, self.signals = self.signals, ()
        for number in signals:
            try:
                self.send_signal(number)
            except OSError:
                pass  # it has just ended; its status tells

    def _deliver_late(self) -> None:
        self._signals_late = False
        self._deliver_queued()

    def deliver(self, number: int) -> None:
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except OSError:
            pass  # it has just ended; its status tells
