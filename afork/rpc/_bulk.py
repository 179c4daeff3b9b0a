"""Large buffers: sealed memfds that take the place of bytes on the socket.

A memfd has no name, so nothing is left behind however either side ends: the
kernel frees it with its last descriptor and mapping. The seals promise the
receiver that the file can neither shrink under its mapping, which would kill
it with SIGBUS, nor change while it is being decoded.
"""

from __future__ import annotations

import errno
import fcntl
import os
from _pickle import PickleBuffer

from .. import _afork

TYPE_CHECKING = False  # see afork/__init__.py
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from _typeshed import ReadableBuffer

    from .._errors import ProtocolError

#: Bytes from which a buffer or payload travels in a memfd.
BULK = 256 << 10

#: Linux 6.3: the file can never be executed; some systems demand it.
MFD_NOEXEC_SEAL = 0x8

SEALS_FIXED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
SEALS_FINAL = SEALS_FIXED | fcntl.F_SEAL_WRITE

_PAGE = os.sysconf("SC_PAGE_SIZE")

_flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that are owned; an error keeps no other open."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            pass


def create() -> int:
    """An empty memfd that can be sealed.

    Raises:
        OSError: no descriptor or no memory is left.
    """
    global _flags
    try:
        return os.memfd_create("afork", _flags)
    except OSError as exc:
        if exc.errno != errno.EINVAL or not _flags & MFD_NOEXEC_SEAL:
            raise
    fd = os.memfd_create("afork", _flags & ~MFD_NOEXEC_SEAL)
    _flags &= ~MFD_NOEXEC_SEAL  # an older kernel: do not ask again
    return fd


def put(buffer: ReadableBuffer) -> int:
    """Copy a contiguous buffer into a new sealed memfd.

    Returns:
        Its descriptor, which the caller owns.

    Raises:
        OSError: no descriptor or no memory is left.
        BufferError: the buffer is not contiguous.
    """
    return put_all((PickleBuffer(buffer).raw(),))[0]


def put_all(views: Sequence[ReadableBuffer], align: int = 1) -> tuple[int, list[int]]:
    """Copy several buffers of bytes into one new sealed memfd.

    Args:
        views: One-dimensional buffers of bytes.
        align: What the offset of each is to be a multiple of.

    Returns:
        Its descriptor, which the caller owns, and where each view begins.

    Raises:
        OSError: no descriptor or no memory is left.
    """
    fd = create()
    offsets = []
    end = 0
    try:
        for buffer in views:
            view = memoryview(buffer)
            start = -(-end // align) * align
            if start > end:
                _write(fd, memoryview(bytes(start - end)))
            _write(fd, view)
            offsets.append(start)
            end = start + view.nbytes
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS_FINAL)
    except BaseException:
        os.close(fd)
        raise
    return fd, offsets


def _write(fd: int, view: memoryview) -> None:
    # By write() and not through a mapping: the kernel then neither zeroes the
    # pages first nor faults for each, and lack of memory is an error, not a
    # signal.
    while view.nbytes:
        view = view[os.write(fd, view) :]


def get(fd: int, readonly: bool, nbytes: int | None = None) -> memoryview:
    """Map a received memfd that :func:`put` has made. Consumes fd, always.

    Args:
        fd: The descriptor.
        readonly: Whether the memory must not be written to. Otherwise it is
            copied on write: the change is seen here only.
        nbytes: The size that the sender has announced.

    Raises:
        ProtocolError: not a memfd of that size, or one that may still change.
        OSError: it cannot be mapped.
    """
    try:
        return map_private(fd, readonly, nbytes)
    finally:
        os.close(fd)


def map_private(fd: int, readonly: bool, nbytes: int | None = None) -> memoryview:
    """As :func:`get`, but fd stays open."""
    size = checked_size(fd, SEALS_FINAL, nbytes)
    if os.fstat(fd).st_blocks * 512 < size:
        # Sizes cost nothing as long as nobody writes: bytes that the sender
        # has not paid for would be our memory once they are decoded.
        raise refused("a memfd with holes")
    return _afork.map_private(fd, size, not readonly)


def checked_size(fd: int, seals: int, nbytes: int | None = None) -> int:
    """The size of a received memfd, which is safe to map.

    Raises:
        ProtocolError: anything else, or one of another size than announced.
    """
    try:
        found = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise refused("a descriptor that is not a memfd") from None
    if found & seals != seals:
        raise refused("a memfd that its sender can still change")
    # Of huge pages: reading it kills whoever finds the system's pool empty.
    if os.fstatvfs(fd).f_bsize != _PAGE:
        raise refused("a memfd of huge pages")
    size = os.fstat(fd).st_size
    if size == 0 or nbytes not in (None, size):
        raise refused(f"a memfd of {size} bytes, {nbytes or 'some'} were announced")
    return size


def refused(what: str) -> ProtocolError:
    """The error for what a peer should not have sent."""
    from .._errors import ProtocolError

    return ProtocolError(f"the peer has sent {what}")
