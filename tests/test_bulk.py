"""Sealed memfds: what is put into them comes out; what is not one is refused."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import socket
import struct
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afork import ProtocolError
from afork.rpc import _bulk
from afork.rpc._bulk import BULK, SEALS_FINAL
from afork.rpc._codecs import find_codec

from .conftest import open_descriptors
from .test_limits import free_slots

PICKLE = find_codec("pickle")


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, BULK, 5_000_001])
@pytest.mark.parametrize("readonly", [True, False])
def test_what_is_put_comes_out(size, readonly):
    data = os.urandom(size)
    view = _bulk.get(_bulk.put(data), readonly)
    assert bytes(view) == data
    assert view.readonly == readonly


def test_the_file_is_sealed_and_ours_alone():
    fd = _bulk.put(b"abc")
    try:
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS_FINAL == SEALS_FINAL
        assert not os.get_inheritable(fd)
        assert not os.fstat(fd).st_nlink
        for change in (
            lambda: os.pwrite(fd, b"x", 0),
            lambda: os.ftruncate(fd, 0),
            lambda: os.ftruncate(fd, 100),
            lambda: mmap.mmap(fd, 3),
        ):
            with pytest.raises(PermissionError):
                change()
    finally:
        os.close(fd)


def test_writable_memory_is_copied_on_write():
    fd = _bulk.put(b"abc" * 2000)
    one = _bulk.map_private(fd, readonly=False)
    two = _bulk.get(fd, readonly=False)
    one[:3] = b"xyz"
    assert (bytes(one[:3]), bytes(two[:3])) == (b"xyz", b"abc")


def test_read_only_memory_cannot_be_written_to():
    view = _bulk.get(_bulk.put(b"abc"), readonly=True)
    with pytest.raises(TypeError):
        view[0] = 1


def test_memory_lives_as_long_as_its_views():
    view = _bulk.get(_bulk.put(b"abcdef"), readonly=True)[2:4]
    assert bytes(view) == b"cd"


def test_short_writes(monkeypatch):
    write = os.write
    monkeypatch.setattr(_bulk.os, "write", lambda fd, data: write(fd, data[:1000]))
    data = os.urandom(5_500)
    assert bytes(_bulk.get(_bulk.put(data), True)) == data


@given(
    st.lists(st.binary(min_size=1, max_size=200), min_size=1), st.sampled_from([1, 64])
)
def test_several_in_one_file(parts, align):
    fd, offsets = _bulk.put_all(parts, align)
    view = _bulk.get(fd, True)
    assert all(offset % align == 0 for offset in offsets)
    assert [
        bytes(view[o : o + len(p)]) for o, p in zip(offsets, parts, strict=True)
    ] == parts


def test_an_older_kernel(monkeypatch):
    create, asked = os.memfd_create, []

    def old(name, flags):
        asked.append(flags)
        if flags & _bulk.MFD_NOEXEC_SEAL:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return create(name, flags)

    monkeypatch.setattr(_bulk.os, "memfd_create", old)
    monkeypatch.setattr(_bulk, "_flags", _bulk._flags | _bulk.MFD_NOEXEC_SEAL)
    for _ in range(2):
        assert bytes(_bulk.get(_bulk.put(b"abc"), True)) == b"abc"
    assert len(asked) == 3  # the first one learns it


# -- failures


def test_no_descriptor_left():
    with free_slots(0), pytest.raises(OSError, match="Too many open files"):
        _bulk.put(b"abc")


def test_too_large_a_file():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            _bulk.put(bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_memory_that_has_holes_itself():
    with pytest.raises(BufferError):
        _bulk.put(memoryview(b"abcdef")[::2])


# -- hostile descriptors


def memfd(size=0, seals=0, data=b"", flags=os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC):
    fd = os.memfd_create("hostile", flags)
    os.ftruncate(fd, size)
    os.write(fd, data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def a_file():
    with tempfile.TemporaryFile() as file:
        file.write(bytes(100))
        file.flush()
        return os.dup(file.fileno())


def a_pipe():
    one, two = os.pipe()
    os.close(two)
    return one


HOSTILE = {
    "pipe": a_pipe,
    "file": a_file,
    "directory": lambda: os.open("/", os.O_RDONLY | os.O_DIRECTORY),
    "path": lambda: os.open("/", os.O_PATH),
    "socket": lambda: socket.socket(socket.AF_UNIX).detach(),
    "null": lambda: os.open("/dev/null", os.O_RDWR),
    "zero": lambda: os.open("/dev/zero", os.O_RDWR),
    "not to be sealed": lambda: os.memfd_create("x", os.MFD_CLOEXEC),
    "unsealed": lambda: memfd(data=bytes(100)),
    "can shrink": lambda: memfd(
        data=bytes(100), seals=SEALS_FINAL & ~fcntl.F_SEAL_SHRINK
    ),
    "can be written": lambda: memfd(
        data=bytes(100), seals=SEALS_FINAL & ~fcntl.F_SEAL_WRITE
    ),
    "empty": lambda: memfd(seals=SEALS_FINAL),
    "shorter": lambda: memfd(data=bytes(99), seals=SEALS_FINAL),
    "longer": lambda: memfd(data=bytes(101), seals=SEALS_FINAL),
    "holes": lambda: memfd(size=1 << 40, data=b"x", seals=SEALS_FINAL),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("readonly", [True, False])
def test_anything_else_is_refused(kind, readonly):
    size = 1 << 40 if kind == "holes" else 100
    with pytest.raises(ProtocolError, match="the peer has sent"):
        _bulk.get(HOSTILE[kind](), readonly, size)


def test_huge_pages_are_refused():
    try:
        fd = os.memfd_create(
            "huge", os.MFD_HUGETLB | os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC
        )
        os.ftruncate(fd, 2 << 20)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS_FINAL)
    except OSError as exc:
        pytest.skip(f"no huge pages here: {exc}")
    with pytest.raises(ProtocolError, match="huge pages"):
        _bulk.get(fd, True)


@pytest.mark.parametrize("kind", HOSTILE)
def test_in_a_message(kind):
    head = struct.pack("=BQ", ord("L"), 100)
    table = struct.pack("=BI", ord("B"), 1) + struct.pack("=IIQQ", 0, 0, 0, 100)
    shared = struct.pack("=BI", ord("B"), 1) + struct.pack("=IIQQ", 0, 2, 0, 100)
    payloads = [head, table, shared]
    if kind in ("longer", "holes"):
        payloads = [head]  # its parts may be used
    if kind == "can be written":
        payloads = [head, table]  # just what a SharedBuffer is
    for payload in payloads:
        with pytest.raises(ProtocolError, match="the peer has sent"):
            PICKLE.decode(payload, (HOSTILE[kind](),))


def entry(number=0, flags=0, offset=0, nbytes=100):
    return struct.pack("=IIQQ", number, flags, offset, nbytes)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x80\x05N.",
        b"B",
        struct.pack("=BI", ord("B"), 0),
        struct.pack("=BI", ord("B"), 1),
        struct.pack("=BI", ord("B"), 2) + entry(),
        struct.pack("=BI", ord("B"), 0xFFFFFFFF) + entry(),
        struct.pack("=BI", ord("B"), 1) + entry(number=1),
        struct.pack("=BI", ord("B"), 2) + entry() + entry(number=2),
        struct.pack("=BI", ord("B"), 1) + entry(number=0xFFFFFFFF),
        struct.pack("=BI", ord("B"), 1) + entry(nbytes=101),
        struct.pack("=BI", ord("B"), 1) + entry(offset=1),
        struct.pack("=BI", ord("B"), 1) + entry(offset=2**64 - 1, nbytes=2**64 - 1),
        struct.pack("=BI", ord("B"), 1) + entry(flags=2),
        struct.pack("=BQ", ord("L"), 2**64 - 1),
        struct.pack("=BQ", ord("L"), 0),
        struct.pack("=BQ", ord("L"), 100) + b"more",
    ],
)
def test_a_table_that_lies(payload):
    before = len(open_descriptors())
    with pytest.raises(ProtocolError, match="the peer has sent"):
        PICKLE.decode(payload, (_bulk.put(bytes(100)),))
    # A descriptor more than the table knows of, before or behind.
    with pytest.raises(ProtocolError, match="the peer has sent"):
        PICKLE.decode(payload, (_bulk.put(bytes(100)), _bulk.put(bytes(100))))
    assert len(open_descriptors()) == before


@given(st.binary(max_size=80), st.integers(1, 3))
def test_any_payload_ends_in_one_exception(payload, count):
    before = len(open_descriptors())
    for start in (b"", b"L", b"B", struct.pack("=BI", ord("B"), 1)):
        with pytest.raises(ProtocolError):
            PICKLE.decode(start + payload, tuple(_bulk.put(b"x") for _ in range(count)))
    assert len(open_descriptors()) == before
