"""Memory that several processes share, and that crosses without a copy."""

from __future__ import annotations

import _weakref
import fcntl
import mmap
import os
import sys
from _pickle import PickleBuffer

from .. import _afork
from . import _bulk
from ._buffers import find_shared, live

TYPE_CHECKING = False  # see afork/__init__.py
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn, SupportsIndex

#: From 3.13 on mmap need not keep a descriptor of its own.
_OPTIONS: Any = {"trackfd": False} if sys.version_info >= (3, 13) else {}


class SharedBuffer(mmap.mmap):
    """Writable memory that is sent to a process without being copied.

    It is an :class:`mmap.mmap`: an object with slices, ``memoryview(buffer)``
    and all else that takes a buffer, ``numpy.frombuffer(buffer)`` among it.
    Sent in a call with the codec ``"pickle"`` or ``"cloudpickle"``, alone or
    within other values, it arrives as a SharedBuffer over *the same* memory,
    and what one side writes the other sees. That goes for memoryviews and
    arrays in its memory as well. Nothing is locked: who writes when is for
    the caller to arrange.

    The memory has no name. It is freed when the last process that has it has
    closed it or ended, however it ended. Pages that nobody has touched take
    none.

    Args:
        nbytes: Its size, which cannot change.

    Raises:
        ValueError: less than one byte.
        OSError: no descriptor or no memory is left.
    """

    _fd: int = -1
    _address: int = 0

    def __new__(cls, nbytes: int) -> SharedBuffer:
        if nbytes < 1:
            raise ValueError(f"a SharedBuffer has at least one byte, not {nbytes}")
        fd = _bulk.create()
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _bulk.SEALS_FIXED)
        except BaseException:
            os.close(fd)
            raise
        return cls._own(fd, nbytes)

    @classmethod
    def _own(cls, fd: int, nbytes: int) -> SharedBuffer:
        """The object over fd, which it takes, always."""
        try:
            self = super().__new__(cls, fd, nbytes, **_OPTIONS)
            address, _ = _afork.buffer_address(self)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self._address = address
        live[address] = address + nbytes, _weakref.ref(self)
        return self

    @property
    def nbytes(self) -> int:
        """Its size; ValueError once it is closed."""
        return len(self)

    @property
    def fd(self) -> int:
        """Descriptor of its memfd, which it owns; ValueError once closed."""
        if self._fd < 0:
            raise ValueError("the SharedBuffer is closed")
        return self._fd

    def fileno(self) -> int:
        """The same as `fd`."""
        return self.fd

    def close(self) -> None:
        """Give up the memory in this process; more than once does no harm.

        Dropping the last reference does it as well.

        Raises:
            BufferError: a memoryview or an array over it is still alive.
        """
        # First: the address may belong to another as soon as it is unmapped.
        entry = live.pop(self._address, None)
        try:
            super().close()
        except BufferError:
            if entry is not None:
                live[self._address] = entry
            raise
        self._drop_descriptor()

    def _drop_descriptor(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __exit__(self, *exc_info: object) -> None:
        self.close()  # that of mmap would not call it

    def __del__(self) -> None:
        if self._fd >= 0:
            live.pop(self._address, None)
            self._drop_descriptor()

    def __repr__(self) -> str:
        if self._fd < 0:
            return "<afork.SharedBuffer closed>"
        return f"<afork.SharedBuffer of {self.nbytes} bytes, fd={self._fd}>"

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        self.fd  # noqa: B018 - closed is another error
        refuse()


def refuse() -> NoReturn:
    """TypeError: a codec that does not know shared buffers has been given one."""
    raise TypeError(
        "a SharedBuffer crosses to a process by descriptor, in calls with the "
        "codec 'pickle' or 'cloudpickle'; other codecs and pickle itself have "
        "only bytes: give them bytes(buffer)"
    )


def attach(fd: int) -> SharedBuffer:
    """The object for a received descriptor. Consumes fd, always.

    Raises:
        ProtocolError: it is not that of a SharedBuffer.
        OSError: it cannot be mapped.
    """
    try:
        nbytes = _bulk.checked_size(fd, _bulk.SEALS_FIXED)
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE:
            raise _bulk.refused("a SharedBuffer that cannot be written to")
    except BaseException:
        os.close(fd)
        raise
    return SharedBuffer._own(fd, nbytes)


# -- pickles: buffers over such memory are out of band, however small


def _reduce_shared(shared: SharedBuffer) -> tuple[object, ...]:
    shared.fd  # noqa: B018 - closed is another error
    return _arrived, (PickleBuffer(shared),)


def _arrived(view: memoryview) -> SharedBuffer:
    shared = view.obj
    if not isinstance(shared, SharedBuffer):
        raise _bulk.refused("a SharedBuffer without its memory")
    return shared


def _reduce_view(view: memoryview) -> tuple[object, ...]:
    buffer = PickleBuffer(view)
    if not view.c_contiguous or find_shared(buffer.raw()) is None:
        raise TypeError(
            "cannot pickle 'memoryview' object: only contiguous ones over the "
            "memory of a SharedBuffer can be sent"
        )
    return _view, (buffer, view.format, view.shape)


def _view(view: memoryview, format: Any, shape: tuple[int, ...]) -> memoryview:
    return view.cast("B").cast(format, shape)


#: For the pickler of a codec that has descriptors.
reducers: dict[type, Callable[[Any], Any]] = {
    SharedBuffer: _reduce_shared,
    memoryview: _reduce_view,
}
