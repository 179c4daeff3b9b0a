"""The queue of frames and descriptors: merged, short, full, broken."""

import contextlib
import errno
import os
import socket
import tempfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from .reference import frame, put_list

bounded = settings(max_examples=500, deadline=None, database=None, print_blob=True)


class Queue:
    """A C queue that sends into one end of a socket; `right` is the other."""

    def __init__(self, ffi, lib, lent=0):
        self.ffi, self.lib = ffi, lib
        self.left, self.right = socket.socketpair()
        self.right.setblocking(False)
        self.q = ffi.new("struct afork_outq *")
        lib.afork_outq_init(self.q)
        self.lent = ffi.new("uint8_t[]", lent + 1)
        self.lent_fds = ffi.new("struct afork_outq_fd[]", 2)
        if lent:
            lib.afork_outq_lend(self.q, self.lent, lent, self.lent_fds, 2)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.left.close()
        self.right.close()
        self.lib.afork_outq_free(self.q)

    def frame(self, letter, payload=b""):
        return self.lib.afork_outq_frame(self.q, letter, payload, len(payload))

    def fd(self, fd, payload=b"", tag=0, first=False):
        """An 'h' frame, or an 'F' frame with the descriptor on its first byte."""
        how = self.lib.AFORK_CARRY_FIRST if first else self.lib.AFORK_CARRY_BEHIND
        letter = ord("F" if first else "h")
        return self.lib.afork_outq_fd_take(
            self.q, how, letter, payload, len(payload), os.dup(fd), tag
        )

    def list(self, letter, strings, cap=1 << 24):
        keep = [self.ffi.new("uint8_t[]", s) for s in strings]
        pairs = [(k, len(s)) for k, s in zip(keep, strings, strict=True)]
        array = self.ffi.new("struct afork_str[]", pairs)
        return self.lib.afork_outq_list(self.q, letter, array, len(strings), cap)

    def flush(self):
        return self.lib.afork_outq_flush(self.q, self.left.fileno())

    def __len__(self):
        return self.lib.afork_outq_len(self.q)

    def received(self):
        """Return what has arrived: bytes, and (position, inode) of descriptors."""
        data, fds = b"", []
        with contextlib.suppress(BlockingIOError):
            # Byte by byte near a descriptor: only so its position is known.
            while (got := socket.recv_fds(self.right, 1, 9)) and got[0]:
                for fd in got[1]:
                    fds.append((len(data), os.fstat(fd).st_ino))
                    os.close(fd)
                data += got[0]
        return data, fds

    def reclaim(self):
        tag, fd = self.ffi.new("uint64_t *"), self.ffi.new("int *")
        got = []
        while self.lib.afork_outq_reclaim(self.q, tag, fd):
            os.close(fd[0])
            got.append(tag[0])
        return got


@pytest.fixture(params=[0, 16], ids=["own", "lent"])
def queue(ffi, lib, request):
    with Queue(ffi, lib, request.param) as q:
        yield q


@pytest.fixture(scope="module")
def files():
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(4)]
        yield [f.fileno() for f in opened]


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def fill(sock) -> None:
    sock.setblocking(False)
    for size in (65536, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.send(b"x" * size)


# A frame without a descriptor (None), with one of four files on a byte behind
# it, or (4 to 7) on its first.
items = st.lists(
    st.tuples(st.none() | st.integers(0, 7), st.binary(max_size=20)), max_size=12
)


def queued(q, files, content):
    """Queue frames; return the bytes and the places of descriptors expected."""
    data, fds = b"", []
    waiting = len(q)
    for index, payload in content:
        if index is None:
            assert q.frame(ord("e"), payload) == 0
            data += frame(b"e", payload)
        elif index < 4:
            assert q.fd(files[index], payload) == 0
            data += frame(b"h", payload)
            fds.append((len(data), os.fstat(files[index]).st_ino))
            data += b"\0"
        else:
            assert q.fd(files[index - 4], payload, first=True) == 0
            fds.append((len(data), os.fstat(files[index - 4]).st_ino))
            data += frame(b"F", payload)
    assert len(q) == waiting + len(data)
    assert q.lib.afork_outq_end(q.q) == q.q.sent + len(q)
    return data, fds


@bounded
@given(items)
@example([])
@example([(0, b""), (1, b""), (2, b"")])
@example([(4, b""), (5, b""), (0, b""), (6, b"x")])
def test_k_descriptors_cost_k_plus_one_sends(ffi, lib, files, content):
    lib.shim_reset()
    with Queue(ffi, lib) as q:
        expected = queued(q, files, content)
        assert q.flush() == 1
        assert len(q) == 0
        # one less when nothing comes before the first of them
        places = [at for at, _ in expected[1]]
        leading = bool(content) and places[:1] != [0]
        assert lib.shim.sends == len(expected[1]) + leading
        assert lib.shim.fds_sent == len(expected[1])
        assert q.received() == expected


@bounded
@given(
    rounds=st.lists(items, min_size=1, max_size=4),
    io_max=st.integers(0, 4),
    eintr=st.sampled_from([0, 2, 3]),
    eagain=st.sampled_from([0, 2, 5]),
)
def test_short_interrupted_and_full(ffi, lib, files, rounds, io_max, eintr, eagain):
    """Nothing is lost or doubled, also when more is queued half-way."""
    before = open_fds()
    lib.shim_reset()
    with Queue(ffi, lib) as q:
        sent, places = b"", []  # what should come
        data, fds = b"", []  # what has come
        lib.shim.io_max, lib.shim.eintr_every = io_max, eintr
        lib.shim.eagain_every = eagain

        def flush():
            nonlocal data, fds
            done = q.flush()
            assert done in (0, 1)
            more, found = q.received()
            fds += [(len(data) + at, inode) for at, inode in found]
            data += more
            return done

        for content in rounds:
            more, found = queued(q, files, content)
            places += [(len(sent) + at, inode) for at, inode in found]
            sent += more
            flush()
        calls = 0
        while not flush():
            calls += 1
            assert calls < 10 * len(sent) + 10
        assert lib.shim.fds_sent == len(places)
        assert q.q.sent == len(sent)
        assert (data, fds) == (sent, places)
    assert open_fds() == before


def test_full_socket(queue, lib, files):
    fill(queue.left)
    expected = queued(queue, files, [(None, b"one"), (0, b""), (None, b"two")])
    assert queue.flush() == 0
    assert queue.flush() == 0
    assert lib.shim.fds_sent == 0
    with contextlib.suppress(BlockingIOError):
        while queue.right.recv(1 << 20):
            pass
    assert queue.flush() == 1
    assert queue.received() == expected


def test_big_frame_in_pieces(queue, files):
    payload = bytes(range(256)) * 16384
    assert queue.fd(files[0], payload) == 0
    assert queue.frame(ord("e"), b"behind") == 0
    data, fds = bytearray(), []
    while queue.flush() == 0:
        for _ in range(20):
            try:
                got, received, _, _ = socket.recv_fds(queue.right, 1 << 16, 9)
            except BlockingIOError:
                break
            assert not received
            data += got
    # the descriptor's own byte stopped the last send before it
    rest, places = queue.received()
    fds += places
    data += rest
    assert bytes(data) == frame(b"h", payload) + b"\0" + frame(b"e", b"behind")
    assert fds[0][1] == os.fstat(files[0]).st_ino
    assert queue.q.cap <= 16  # a big buffer is given back, to what was lent


def test_in_flight_limit_is_a_full_socket(queue, lib, files):
    """ETOOMANYREFS: nobody has received the user's other descriptors yet."""
    expected = queued(queue, files, [(0, b""), (1, b"")])
    lib.shim.send_errno = errno.ETOOMANYREFS
    assert queue.flush() == 0
    assert queue.q.crowded
    assert len(queue) == len(expected[0])
    lib.shim.send_errno = errno.EAGAIN
    assert queue.flush() == 0
    assert not queue.q.crowded
    lib.shim.send_errno = 0
    assert queue.flush() == 1
    assert queue.received() == expected


def test_lent_memory_is_outgrown_and_taken_again(ffi, lib, files):
    with Queue(ffi, lib, 40) as q:
        for _ in range(2):
            assert q.fd(files[0], b"a") == q.fd(files[1], b"b") == 0
            assert (q.q.buf, q.q.cap) == (q.lent, 40)
            assert (q.q.fds, q.q.fds_cap) == (q.lent_fds, 2)
            for _ in range(3000):
                assert q.fd(files[2], b"c" * 20, first=True) == 0
            assert q.q.buf != q.lent
            assert q.q.fds != q.lent_fds
            data = b""
            while q.flush() == 0:
                data += q.received()[0]
            data += q.received()[0]
            expected = frame(b"h", b"a") + b"\0" + frame(b"h", b"b") + b"\0"
            assert data == expected + 3000 * frame(b"F", b"c" * 20)
            assert q.q.buf == q.lent
            assert q.q.fds == q.lent_fds
        assert q.lent[40] == 0


def test_broken_socket(queue, files):
    before = open_fds()
    queued(queue, files, [(None, b"one"), (0, b""), (1, b"")])
    queue.right.close()
    assert queue.flush() == -errno.EPIPE
    assert queue.flush() == -errno.EPIPE
    assert len(queue)
    queue.lib.afork_outq_free(queue.q)
    assert len(queue) == 0
    assert open_fds() == before - 1  # queue.right


def test_list(queue):
    strings = [b"code", b"", b"x" * 200]
    data = put_list(strings)
    assert queue.list(ord("e"), strings, cap=len(data) - 1) == -errno.E2BIG
    assert len(queue) == 0
    assert queue.list(ord("e"), strings, cap=len(data)) == 0
    assert queue.list(ord("a"), [], cap=0) == 0
    assert queue.flush() == 1
    assert queue.received() == (frame(b"e", data) + frame(b"a"), [])


def test_oversized_lengths(ffi, lib, queue):
    big = lib.afork_outq_frame(queue.q, ord("e"), ffi.NULL, 2**32)
    assert big == -errno.E2BIG
    array = ffi.new("struct afork_str[]", [(ffi.NULL, 2**32)])
    r = lib.afork_outq_list(queue.q, ord("e"), array, 1, 2**40)
    assert r == -errno.E2BIG
    before = open_fds()
    for size in (2**62, 2**64 - 7):
        fd = os.dup(0)
        how = lib.AFORK_CARRY_FIRST
        r = lib.afork_outq_fd_take(queue.q, how, ord("F"), ffi.NULL, size, fd, 0)
        assert r == -errno.ENOMEM
    assert open_fds() == before
    assert len(queue) == 0


def test_no_memory_is_all_or_nothing(ffi, lib, files):
    """Each allocation in turn fails: the stream stays one of whole frames."""
    payload = b"x" * 30_000
    for nth in range(1, 8):
        before = open_fds()
        with Queue(ffi, lib) as q:
            expected, places, failed = b"", [], False
            lib.shim_reset()
            lib.shim.alloc_fail_at = nth
            for index, size in ((None, 0), (0, 0), (1, 30_000), (None, 30_000)):
                at = len(q)
                if index is None:
                    r = q.frame(ord("e"), payload[:size])
                    more = frame(b"e", payload[:size])
                else:
                    r = q.fd(files[index], payload[:size])
                    more = frame(b"h", payload[:size]) + b"\0"
                assert r in (0, -errno.ENOMEM)
                failed |= r < 0
                if r == 0:
                    expected += more
                    if index is not None:
                        inode = os.fstat(files[index]).st_ino
                        places.append((len(expected) - 1, inode))
                else:
                    assert len(q) == at
            done = lib.shim.alloc_fail_at > 0
            assert failed == (not done)
            q.left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            assert q.flush() == 1
            assert q.received() == (expected, places)
        assert open_fds() == before
        if done:
            return
    pytest.fail("more allocations than expected")


def test_reclaim(queue, lib, files):
    """After a loss: what the other side cannot have seen any byte of."""
    before = open_fds()
    for tag in (0, 11, 12, 0, 13):
        assert queue.fd(files[0], b"", tag) == 0
    lib.shim.eagain_every = 3
    assert queue.flush() == 0
    assert queue.q.sent == 5 + 6  # a frame; its NUL and the next frame
    assert queue.reclaim() == [12, 13]  # 11 was announced already
    assert queue.reclaim() == []
    queue.lib.afork_outq_free(queue.q)
    assert open_fds() == before


def test_reclaim_all(queue, files):
    for tag in (11, 12):
        assert queue.fd(files[0], b"", tag) == 0
    assert queue.reclaim() == [11, 12]


def test_reclaim_nothing(queue, files):
    assert queue.fd(files[0], b"", 11) == 0
    assert queue.flush() == 1
    assert queue.reclaim() == []


def test_a_tagged_frame_is_taken_back_only_whole(ffi, lib):
    """Also without a descriptor, and not once any of it has been sent."""
    tag, fd = ffi.new("uint64_t *"), ffi.new("int *")
    with Queue(ffi, lib) as q:
        assert lib.afork_outq_tagged(q.q, ord("M"), b"12345678", 8, 5) == 0
        q.fd(0, tag=6, first=True)
        assert lib.afork_outq_reclaim(q.q, tag, fd) == 1
        assert (tag[0], fd[0]) == (5, lib.AFORK_NOFD)
        assert lib.afork_outq_reclaim(q.q, tag, fd) == 1
        assert tag[0] == 6
        os.close(fd[0])
        assert lib.afork_outq_reclaim(q.q, tag, fd) == 0
    with Queue(ffi, lib) as q:
        q.frame(ord("e"), b"first")
        assert lib.afork_outq_tagged(q.q, ord("M"), b"12345678", 8, 5) == 0
        q.frame(ord("e"), b"last")
        assert q.flush() == 1
        assert lib.afork_outq_reclaim(q.q, tag, fd) == 0
        data, fds = q.received()
        assert data == frame(b"e", b"first") + frame(b"M", b"12345678") + frame(
            b"e", b"last"
        )
        assert fds == []
