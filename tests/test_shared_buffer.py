"""SharedBuffer: one memory, seen by several processes, sent without a copy."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import gc
import importlib.util
import io
import json
import mmap
import os
import pickle
import signal
import socket
import struct
from pickle import PickleBuffer

import pytest

import afork
from afork import ProtocolError, SharedBuffer
from afork.rpc import _bulk
from afork.rpc._buffers import live
from afork.rpc._bulk import BULK
from afork.rpc._codecs import close_all, find_codec

from .conftest import need, open_descriptors
from .test_limits import free_slots

PICKLE = find_codec("pickle")


@pytest.fixture(autouse=True)
def nothing_stays_known():
    yield
    gc.collect()
    assert not live


def through(value, codec=PICKLE):
    payload, fds = codec.encode(value)
    return codec.decode(payload, fds)


# -- the object


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, 10_000_000])
def test_it_is_writable_memory(nbytes):
    buffer = SharedBuffer(nbytes)
    assert isinstance(buffer, mmap.mmap)
    assert buffer.nbytes == len(buffer) == nbytes == memoryview(buffer).nbytes
    assert buffer[:] == bytes(nbytes)
    buffer[0:1] = b"x"
    memoryview(buffer)[nbytes - 1] = 7
    assert buffer[-1] == 7
    assert io.BytesIO(b"z").readinto(memoryview(buffer)[:1]) == 1


def test_its_file_is_sealed_and_private():
    buffer = SharedBuffer(100)
    seals = fcntl.fcntl(buffer.fd, fcntl.F_GET_SEALS)
    assert seals & _bulk.SEALS_FINAL == _bulk.SEALS_FIXED
    assert not os.get_inheritable(buffer.fd)
    for size in (0, 50, 5000):
        with pytest.raises(PermissionError):
            os.ftruncate(buffer.fileno(), size)
    with pytest.raises((OSError, ValueError)):
        buffer.resize(50)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_no_memory_at_all(nbytes):
    with pytest.raises(ValueError, match="at least one byte"):
        SharedBuffer(nbytes)


@pytest.mark.parametrize("nbytes", [None, "5", 1.5])
def test_no_number(nbytes):
    with pytest.raises(TypeError):
        SharedBuffer(nbytes)


@pytest.mark.parametrize("nbytes", [1 << 62, 1 << 63, 1 << 100])
def test_more_than_there_is(nbytes):
    with pytest.raises((OSError, OverflowError)):
        SharedBuffer(nbytes)


@pytest.mark.parametrize("free", [0, 1])
def test_no_descriptor_left(free):
    # Where mmap keeps one of its own, one is not enough.
    with free_slots(free), contextlib.suppress(OSError):
        SharedBuffer(100).close()
        assert free == 1


def test_close():
    before = len(open_descriptors())
    buffer = SharedBuffer(100)
    assert "100 bytes" in repr(buffer)
    with buffer as entered:
        assert entered is buffer
    assert len(open_descriptors()) == before
    assert not live
    buffer.close()
    assert repr(buffer) == "<afork.SharedBuffer closed>"
    for use in (
        lambda: buffer.fd,
        buffer.fileno,
        lambda: buffer.nbytes,
        lambda: buffer[0],
        lambda: PICKLE.encode(buffer),
    ):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_memory_in_use_is_not_closed():
    buffer = SharedBuffer(100)
    view = memoryview(buffer)
    with pytest.raises(BufferError):
        buffer.close()
    view[0] = 5
    assert through(buffer)[0] == 5  # as if nothing had been tried
    del view
    buffer.close()


def test_dropping_it_frees_it():
    before = len(open_descriptors())
    view = memoryview(SharedBuffer(100))
    assert len(open_descriptors()) > before  # a view keeps it
    assert len(live) == 1
    del view
    assert len(open_descriptors()) == before


def test_a_circle_of_references():
    buffer = SharedBuffer(100)
    buffer.me = buffer
    del buffer
    gc.collect()
    assert not live


def test_closed_descriptors_are_not_closed_twice():
    buffer = SharedBuffer(100)
    fd = buffer.fd
    buffer.close()
    other = os.open("/dev/null", os.O_RDONLY)
    assert other <= fd
    del buffer
    os.close(other)


# -- messages


def test_it_arrives_over_the_same_memory():
    buffer = SharedBuffer(100)
    payload, fds = PICKLE.encode((1, buffer))
    assert len(payload) < 200
    assert len(fds) == 1
    _, arrived = PICKLE.decode(payload, fds)
    assert type(arrived) is SharedBuffer
    assert arrived.nbytes == 100
    assert arrived is not buffer
    buffer[:3] = b"abc"
    arrived[3:6] = b"def"
    assert arrived[:6] == buffer[:6] == b"abcdef"
    buffer.close()
    assert arrived[:6] == b"abcdef"


def test_it_can_be_forwarded():
    buffer = SharedBuffer(100)
    third = through(through(through(buffer)))
    third[0] = 7
    assert buffer[0] == 7


def test_one_message_has_it_once():
    buffer, other = SharedBuffer(100), SharedBuffer(100)
    value = [buffer, {"again": buffer}, memoryview(buffer)[10:20], other]
    payload, fds = PICKLE.encode(value)
    assert len(fds) == 2
    one, again, view, two = PICKLE.decode(payload, fds)
    assert again["again"] is one
    assert view.obj is one
    assert two is not one


def test_views_into_it():
    buffer = SharedBuffer(1000)
    view = memoryview(buffer)
    for part in (
        view,
        view[:1],
        view[999:],
        view[8:808].cast("d"),
        view[:12].cast("i", (3, 1)),
    ):
        got = through(part)
        assert (got.format, got.shape, got.nbytes) == (
            part.format,
            part.shape,
            part.nbytes,
        )
        assert not got.readonly
        got.cast("B")[-1] = 77
        assert part.cast("B")[-1] == 77
    got = through(view[5:10].toreadonly())
    assert got.readonly
    assert type(got.obj) is SharedBuffer
    assert through(PickleBuffer(view[5:10])).obj.nbytes == 1000


def test_an_empty_view_has_no_memory():
    view = memoryview(SharedBuffer(10))
    with pytest.raises(TypeError, match="memoryview"):
        through(view[:0])
    assert through(PickleBuffer(view[:0])) == b""


@pytest.mark.parametrize("make", [lambda v: v[::2], lambda v: memoryview(b"abc")])
def test_views_that_cannot_be_sent(make):
    view = memoryview(SharedBuffer(100))
    with pytest.raises((TypeError, BufferError, pickle.PicklingError)):
        PICKLE.encode([make(view)])


def test_together_with_large_buffers():
    buffer = SharedBuffer(BULK * 2)
    values = [buffer, *(PickleBuffer(bytes([n]) * BULK) for n in range(20)), "x" * BULK]
    payload, fds = PICKLE.encode(values)
    assert len(fds) == 1 + 17 + 1
    result = PICKLE.decode(payload, fds)
    assert result[0].nbytes == BULK * 2
    assert [bytes(x[:1]) for x in result[1:-1]] == [bytes([n]) for n in range(20)]
    assert result[-1] == values[-1]


def test_small_calls_stay_small_while_one_is_alive():
    buffer = SharedBuffer(100)
    assert PICKLE.encode((1, 2)) == (pickle.dumps((1, 2), 5), ())
    with pytest.raises(TypeError, match="lock"):
        PICKLE.encode((buffer, __import__("_thread").allocate_lock()))


def test_as_many_as_a_message_can_carry():
    buffers = [SharedBuffer(10) for _ in range(236)]
    rest = [PickleBuffer(bytes(BULK)) for _ in range(20)]
    with pytest.raises(ValueError, match="236 SharedBuffers"):
        PICKLE.encode(buffers)
    value = [*buffers[1:], *rest, "x" * BULK]
    payload, fds = PICKLE.encode(value)
    assert len(fds) == 253
    assert len(PICKLE.decode(payload, fds)) == len(value)


def test_no_descriptor_left_for_a_message():
    buffers = [SharedBuffer(10) for _ in range(3)]
    with free_slots(2), pytest.raises(OSError, match="Too many open files"):
        PICKLE.encode(buffers)
    payload, fds = PICKLE.encode(buffers)
    with free_slots(0):
        try:
            PICKLE.decode(payload, fds)  # 3.13: it needs none
        except OSError as exc:
            assert exc.errno == 24  # noqa: PT017


def test_other_codecs_refuse_it():
    buffer = SharedBuffer(10)
    for codec in map(find_codec, ("json", "bytes")):
        with pytest.raises(TypeError, match="SharedBuffer"):
            codec.encode([buffer])
    for use in (
        lambda: pickle.dumps(buffer),
        lambda: pickle.dumps(buffer, 0),
        lambda: pickle.dumps([buffer], 5, buffer_callback=lambda _: None),
        lambda: copy.copy(buffer),
        lambda: copy.deepcopy(buffer),
    ):
        with pytest.raises(TypeError, match="by descriptor"):
            use()
    with pytest.raises(TypeError):
        json.dumps(buffer)
    # A copy has to be asked for.
    assert find_codec("bytes").encode([memoryview(buffer)])[0][1:] == bytes(10)


def test_cloudpickle_knows_it():
    found = bool(importlib.util.find_spec("cloudpickle"))
    need("cloudpickle", found, "cloudpickle is not installed")
    buffer = SharedBuffer(10)
    arrived, view, add = through(
        [buffer, memoryview(buffer)[2:4], lambda x: x + 1], find_codec("cloudpickle")
    )
    buffer[2] = 7
    assert (arrived[2], view[0], add(1)) == (7, 7, 2)


def test_memory_of_a_closed_one_is_not_taken_for_its(monkeypatch):
    buffer = SharedBuffer(BULK)
    start = next(iter(live))
    buffer.close()
    assert start not in live
    data = bytearray(b"a" * BULK)
    assert bytes(through(PickleBuffer(data))) == bytes(data)


# -- hostile messages


def test_what_claims_to_be_one_and_is_not():
    table = struct.pack("=BIIIQQ", ord("B"), 1, 0, 2, 0, 10)

    def memfd(size, seals):
        fd = os.memfd_create("x", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return fd

    for fd in (
        memfd(10, 0),
        memfd(10, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL),
        memfd(10, fcntl.F_SEAL_SHRINK),
        memfd(9, _bulk.SEALS_FIXED),  # its view ends behind it
        memfd(10, _bulk.SEALS_FINAL),
        memfd(0, _bulk.SEALS_FIXED),
        os.open("/dev/null", os.O_RDWR),
        os.memfd_create("x", os.MFD_CLOEXEC),
    ):
        with pytest.raises(ProtocolError, match="the peer has sent"):
            PICKLE.decode(table + b"\x80\x05N.", (fd,))
    gc.collect()


def test_a_pickle_that_makes_one_of_other_memory():
    payload, fds = PICKLE.encode(SharedBuffer(10))
    close_all(fds)
    at = payload.index(b"\x80\x05")
    table = struct.pack("=BIIIQQ", ord("B"), 1, 0, 0, 0, 10)
    with pytest.raises(ProtocolError, match="without its memory"):
        PICKLE.decode(table + payload[at:], (_bulk.put(bytes(10)),))


# -- processes

CODE = """
import os, socket
from afork.rpc._codecs import close_all, find_codec

codec = find_codec("pickle")

def receive(sock):
    data, fds, _, _ = socket.recv_fds(sock, 1 << 18, 253)
    return codec.decode(data, tuple(fds))

def send(sock, value):
    payload, fds = codec.encode(value)
    socket.send_fds(sock, [payload], list(fds))
    close_all(fds)

def echo(sock):
    while True:
        value = receive(sock)
        value[0][:5] = b"hello"
        send(sock, value)

def die(sock):
    buffer = receive(sock)
    buffer[:4] = b"dead"
    os.kill(os.getpid(), 9)

def make(sock):
    from afork import SharedBuffer
    buffer = SharedBuffer(1000)
    buffer[:4] = b"left"
    send(sock, buffer)
    os.kill(os.getpid(), 9)
"""


def send(sock, value):
    sock.setblocking(True)
    payload, fds = PICKLE.encode(value)
    socket.send_fds(sock, [payload], list(fds))
    close_all(fds)


def receive(sock):
    sock.setblocking(True)
    sock.settimeout(10)
    data, fds, _, _ = socket.recv_fds(sock, BULK, 253)
    return PICKLE.decode(data, tuple(fds))


def test_a_worker_writes_into_it(arun):
    async def main():
        with await afork.Fork.new().eval(CODE).run("echo") as sock:
            buffer = SharedBuffer(100_000)
            for text in (b"first", b"again"):
                buffer[:5] = text
                send(sock, [buffer, memoryview(buffer)[3:8]])
                back, view = receive(sock)
                assert buffer[:5] == back[:5] == b"hello"
                assert bytes(view) == b"lo\0\0\0"
                back[:1] = b"j"
                assert buffer[:5] == b"jello"

    arun(main)


def test_the_worker_is_killed(arun):
    async def main():
        f = afork.Fork.new().eval(CODE)
        with await f.run("die") as sock:
            buffer = SharedBuffer(100_000)
            send(sock, buffer)
            assert await f.wait() == -signal.SIGKILL
        assert buffer[:4] == b"dead"
        buffer[:4] = b"live"

    arun(main)


def test_the_worker_that_made_it_is_killed(arun):
    async def main():
        f = afork.Fork.new().eval(CODE)
        with await f.run("make") as sock:
            assert await f.wait() == -signal.SIGKILL
            buffer = receive(sock)
        assert buffer[:4] == b"left"
        buffer[:4] = b"ours"
        assert through(buffer)[:4] == b"ours"

    arun(main)


def test_a_message_that_nobody_takes_is_gone(arun):
    async def main():
        f = afork.Fork.new().eval("import signal\ndef sleep(sock): signal.pause()")
        with await f.run("sleep") as sock:
            before = len(open_descriptors())
            for _ in range(5):
                send(sock, SharedBuffer(1000))
            assert len(open_descriptors()) == before
            f.kill()

    arun(main)


def test_forked_processes_share_it(run_script):
    run_script(
        """
        import os
        from afork import SharedBuffer
        from afork.rpc._codecs import find_codec

        buffer = SharedBuffer(100)
        pid = os.fork()
        if not pid:
            codec = find_codec("pickle")
            codec.decode(*codec.encode(buffer))[:5] = b"child"
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert buffer[:5] == b"child"
        """.replace("\n        ", "\n")
    )


def test_numpy_arrays(run_script):
    need("numpy", bool(importlib.util.find_spec("numpy")), "numpy is not installed")
    run_script(
        """
        import numpy as np
        from afork import SharedBuffer
        from afork.rpc._codecs import find_codec

        codec = find_codec("pickle")

        def through(value):
            payload, fds = codec.encode(value)
            assert len(payload) < 2000
            return codec.decode(payload, fds), len(fds)

        buffer = SharedBuffer(8_000_000)
        array = np.frombuffer(buffer, dtype=float).reshape(1000, 1000)
        parts = [array, array[10:12], array.T, array[5], array[0, :3], array[3:4, 2:3]]
        result, n = through(parts)
        assert n == 1
        for part, got in zip(parts, result):
            assert (got.shape, got.dtype) == (part.shape, part.dtype)
        array[11, 5] = 7
        assert result[0][11, 5] == result[1][1, 5] == result[2][5, 11] == 7
        result[4][1] = 3
        assert array[0, 1] == 3

        del buffer  # the array keeps it, and is still in it
        (again,), n = through([through([array])[0][0]])
        again[0, 0] = 9
        assert (array[0, 0], n) == (9, 1)

        # Copied, as it is not one piece.
        strided, n = through(array[:3, ::500])
        strided[:] = 1
        assert (n, array[0, 0]) == (0, 9)
        """.replace("\n        ", "\n"),
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
