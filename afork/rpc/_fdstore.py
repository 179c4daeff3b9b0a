"""The files that a captured call writes to, kept so that they outlive its process.

The store is the queue of a socket pair. The process has both ends: it sends
the files' descriptors to itself ahead of the call, and throws the message away
after the answer. The application has the receiving end as well, and reads only
when the process has died in between. So a call that goes well costs the
application nothing, and no process needs more than two descriptors for it.

The message names the call, so one that is left over is nobody else's.
"""

from __future__ import annotations

import os
import socket
import struct

from ._kinds import FDSTORE

TYPE_CHECKING = False  # see afork/__init__.py
if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from afork import _afork

    from ._call import Call

#: A message: the id of the call, and with it descriptors for 1 and 2.
_ID = struct.Struct("=Q")
_FDS = struct.Struct("=2i")


class FdStore:
    """The application's end."""

    def __init__(self) -> None:
        """Make the sockets.

        Raises:
            OSError: no descriptor is left.
        """
        #: What the process is to be sent, in this order; -1 once closed here.
        self.fds = [-1, -1]
        receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.fds = [receiver.detach(), sender.detach()]

    @classmethod
    def give(cls, link: _afork.Link) -> FdStore | None:
        """Make one and send it to a process; None if no descriptor is left."""
        try:
            store = cls()
            link.send(FDSTORE, 0, b"", store.fds)
        except OSError:
            return None  # calls go on without, and the next one tries again
        store._close(1)
        return store

    def close(self) -> None:
        """Close what is open, and with the last copy what is in it."""
        self._close(0)
        self._close(1)

    __del__ = close

    def _close(self, end: int) -> None:
        fd, self.fds[end] = self.fds[end], -1
        if fd >= 0:
            os.close(fd)

    def find_output(self, calls: dict[int, Call]) -> None:
        """Let a call that the process was at keep what it has written.

        Never waits. For a process that has died or is about to be killed.

        Args:
            calls: Those without an answer, by id.
        """
        try:
            found = self._take(calls)
        except (OSError, MemoryError):
            return  # what has become of the process is to be told all the same
        if found is not None:
            id, output = found
            calls[id].output = output

    def _take(
        self, wanted: Container[int]
    ) -> tuple[int, tuple[bytes, bytes, bool]] | None:
        """The call in it and its output; None if it is not one that is wanted.

        Raises:
            OSError: it cannot be read.
        """
        import fcntl

        from ._redirect import contents

        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, self.fds[0])
        try:
            flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            data, fds, _, _ = socket.recv_fds(sock, _ID.size, 2, flags)
        except BlockingIOError:
            return None
        finally:
            sock.detach()
        try:
            if len(data) != _ID.size or len(fds) != 2:
                return None  # or this process has too many descriptors
            (id,) = _ID.unpack(data)
            if id not in wanted:
                return None
            for fd in fds:
                # Only of memory: to read another file may take for ever.
                fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            (out, out_cut), (err, err_cut) = map(contents, fds)
            return id, (out, err, out_cut or err_cut)
        finally:
            for fd in fds:
                os.close(fd)


class Keeper:
    """The process's end."""

    def __init__(self, fds: Sequence[int]) -> None:
        """Use the sockets that the application has sent; they are owned."""
        kind = socket.AF_UNIX, socket.SOCK_SEQPACKET, 0
        self.receiver, self.sender = (socket.socket(*kind, fd) for fd in fds)
        self.full = False

    def put(self, id: int, files: Sequence[int]) -> None:
        """Keep the files of a call that begins."""
        rights = socket.SOL_SOCKET, socket.SCM_RIGHTS, _FDS.pack(*files)
        try:
            self.sender.sendmsg([_ID.pack(id)], [rights], socket.MSG_DONTWAIT)
            self.full = True
        except OSError:
            pass  # too many in flight, or closed by a function: the call goes on

    def clear(self) -> None:
        """The call has been answered: they are not needed any more."""
        self.full = False
        try:
            # Without a buffer for them: the kernel closes what was sent along.
            self.receiver.recv(_ID.size, socket.MSG_DONTWAIT)
        except OSError:
            pass
