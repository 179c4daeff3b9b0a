"""Payloads that come with descriptors: what the descriptors are, in bytes.

A payload without descriptors is what the codec has made, and nothing else, so
the small case costs nothing. One with descriptors begins with a letter
(integers are native, as everywhere):

``L``, uint64 size
    The first descriptor is a sealed memfd of that size, in which the payload
    continues. If it is the only descriptor, its contents are what the codec
    has made; otherwise they begin with a ``B``.

``B``, uint32 count, then count entries, then what the codec has made
    The out-of-band buffers of the pickle, in their order. An entry is uint32
    descriptor (0 is the first, that of an ``L`` not counted), uint32 flags,
    uint64 offset, uint64 nbytes: that part of the descriptor's memory is the
    buffer. Flag 1: the buffer is read-only. Flag 2: the descriptor is that of
    a SharedBuffer, to be mapped as it is; the memory of others is copied on
    write. Every descriptor has at least one entry.

docs/protocol.rst says the same to others.
"""

from __future__ import annotations

import os
import struct

from .. import _afork
from ._bulk import BULK, close_all, map_private, put_all, refused

TYPE_CHECKING = False  # see afork/__init__.py
if TYPE_CHECKING:
    from _pickle import PickleBuffer
    from collections.abc import Callable

    from ._shared import SharedBuffer

_LARGE, _BUFFERS = b"LB"
_HEAD = struct.Struct("=BQ")
_TABLE = struct.Struct("=BI")
_ENTRY = struct.Struct("=IIQQ")
_READONLY, _SHARED = 1, 2

#: Descriptors that one message can carry (SCM_MAX_FD of Linux).
_FDS_MAX = 253

#: Buffers with a memfd of their own; more share one. With one each, memory is
#: freed with its buffer, but descriptors in flight are limited for a user.
_OWN_MAX = 16

#: What numpy likes buffers to be aligned to.
_ALIGN = 64

#: The SharedBuffers of this process: where each begins -> its end, and a weak
#: reference. Few are alive at a time, so they are searched one by one: a
#: sorted list would need a lock against threads and destructors.
live: dict[int, tuple[int, Callable[[], SharedBuffer | None]]] = {}


def find_shared(raw: memoryview) -> tuple[SharedBuffer, int] | None:
    """The SharedBuffer in which the memory of a view of bytes lies, and its offset."""
    if not live:
        return None
    address, nbytes = _afork.buffer_address(raw)
    for start, (end, reference) in tuple(live.items()):
        if start <= address and address + nbytes <= end and nbytes:
            shared = reference()
            if shared is not None and not shared.closed:
                return shared, address - start
    return None


class Outgoing:
    """Collects the buffers of one pickle; `add` is its buffer_callback."""

    __slots__ = ("_large", "_shared", "_table")

    def __init__(self) -> None:
        self._table: list[tuple[SharedBuffer | None, int, memoryview]] = []
        self._shared: dict[int, SharedBuffer] = {}
        self._large: list[memoryview] = []

    def add(self, buffer: PickleBuffer) -> bool:
        """Whether the buffer is to stay in the pickle."""
        raw = buffer.raw()
        found = find_shared(raw)
        if found is not None:
            shared, offset = found
            self._shared[id(shared)] = shared
            self._table.append((shared, offset, raw))
            return False
        if raw.nbytes < BULK:
            return True
        self._large.append(raw)
        self._table.append((None, 0, raw))
        return False

    def finish(self, payload: bytes) -> tuple[bytes, tuple[int, ...]]:
        """The whole payload, and its descriptors, which the caller owns.

        Raises:
            OSError: no descriptor or no memory is left.
            ValueError: more SharedBuffers than a message can carry.
        """
        fds: list[int] = []
        try:
            head = self._send(fds) if self._table else b""
            size = len(head) + len(payload)
            if size < BULK:
                return head + payload, tuple(fds)
            # Not joined before: the payload may be half of all memory.
            fd, _ = put_all((head, payload))
            return _HEAD.pack(_LARGE, size), (fd, *fds)
        except BaseException:
            close_all(fds)
            raise

    def _send(self, fds: list[int]) -> bytes:
        if len(self._shared) > _FDS_MAX - _OWN_MAX - 2:
            raise ValueError(
                f"{len(self._shared)} SharedBuffers in one message: "
                f"at most {_FDS_MAX - _OWN_MAX - 2} can be sent"
            )
        where = {}
        for key, shared in self._shared.items():
            where[key] = len(fds)
            fds.append(os.dup(shared.fileno()))
        # (descriptor, offset) of each large buffer, in their order
        places = []
        for raw in self._large[:_OWN_MAX]:
            places.append((len(fds), 0))
            fds.append(put_all((raw,))[0])
        if rest := self._large[_OWN_MAX:]:
            fd, offsets = put_all(rest, _ALIGN)
            places += [(len(fds), offset) for offset in offsets]
            fds.append(fd)
        place = iter(places)
        parts = [_TABLE.pack(_BUFFERS, len(self._table))]
        for owner, offset, raw in self._table:
            flags = _READONLY if raw.readonly else 0
            if owner is None:
                number, offset = next(place)
            else:
                number = where[id(owner)]
                flags |= _SHARED
            parts.append(_ENTRY.pack(number, flags, offset, raw.nbytes))
        return b"".join(parts)


def unwrap(
    payload: bytes, fds: tuple[int, ...]
) -> tuple[memoryview, list[memoryview] | None]:
    """What the codec has made, and its buffers if there is a table of them.

    Args:
        payload: A payload that came with descriptors.
        fds: They. Consumed, always.

    Raises:
        ProtocolError: the payload, or a descriptor, is not what it should be.
        OSError: it cannot be mapped.
    """
    left = dict(enumerate(fds))
    try:
        text = memoryview(payload)
        first = 0
        if text.nbytes == _HEAD.size and text[0] == _LARGE:
            text = map_private(left[0], True, _HEAD.unpack(text)[1])
            first = 1
        if first and len(fds) == 1:
            return text, None
        text, entries = _split(text)
        return text, _receive(entries, left, first)
    finally:
        close_all(left.values())


def _split(text: memoryview) -> tuple[memoryview, list[tuple[int, int, int, int]]]:
    """Take the table from the beginning."""
    if text.nbytes < _TABLE.size or text[0] != _BUFFERS:
        raise refused("descriptors that its payload does not explain")
    end = _TABLE.size + _ENTRY.size * _TABLE.unpack(text[: _TABLE.size])[1]
    if end > text.nbytes:
        raise refused("a table of buffers that is cut off")
    return text[end:], list(_ENTRY.iter_unpack(text[_TABLE.size : end]))


def _receive(
    entries: list[tuple[int, int, int, int]], left: dict[int, int], first: int
) -> list[memoryview]:
    """Map the descriptors; those that are kept are taken from `left`."""
    kinds: dict[int, int] = {}
    for number, flags, _, _ in entries:
        # Writable if one of its buffers is.
        kinds[number] = flags & kinds.get(number, flags)
    if kinds.keys() != {n - first for n in left if n >= first}:
        raise refused("a table of buffers that is not about its descriptors")
    memory = {}
    for number, flags in kinds.items():
        if flags & _SHARED:
            from ._shared import attach

            # Consumes it, so it is not ours any more.
            memory[number] = memoryview(attach(left.pop(number + first)))
        else:
            memory[number] = map_private(left[number + first], bool(flags & _READONLY))
    buffers = []
    for number, _, offset, nbytes in entries:
        whole = memory[number]
        if offset + nbytes > whole.nbytes:
            raise refused("a buffer that is larger than its memory")
        buffers.append(whole[offset : offset + nbytes])
    return buffers
