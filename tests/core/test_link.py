"""RPC frames: however they are cut up, and whatever comes with them."""

import contextlib
import errno
import os
import socket
import tempfile

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from .reference import (
    LINK_FRAME_MAX,
    LINK_HEAD,
    LinkReader,
    link_frame,
    recvmsgs,
)

ERRORS = {
    -errno.EPROTO: "EPROTO",
    -errno.EPIPE: "EPIPE",
    -errno.EMFILE: "EMFILE",
}
KEPT = 1 << 16  # bytes of a buffer that is not given back

bounded = settings(max_examples=1000, deadline=None, database=None, print_blob=True)


class End:
    """A C link on one end of a socket; `peer` is the other."""

    def __init__(self, ffi, lib):
        self.ffi, self.lib = ffi, lib
        self.peer, ours = socket.socketpair()
        self.peer.settimeout(10)
        self.link = ffi.new("struct afork_link *")
        lib.afork_link_init_take(self.link, ours.detach())
        self.frame = ffi.new("struct afork_link_frame *")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.peer.close()
        self.lib.afork_link_free(self.link)

    def send(self, kind=0, number=0, payload=b"", fds=()):
        return self.lib.afork_link_send(
            self.link, kind, number, payload, len(payload), list(fds), len(fds)
        )

    def flush(self):
        return self.lib.afork_link_flush(self.link)

    def fill(self, wait=0):
        return self.lib.afork_link_fill(self.link, wait)

    def ready(self):
        """Take the complete frames; the descriptors are the caller's."""
        frames = []
        while self.lib.afork_link_peek(self.link, self.frame):
            f = self.frame
            payload = self.ffi.buffer(f.payload, f.len)[:] if f.len else b""
            fds = [f.fds[i] for i in range(f.nfds)]
            assert not any(map(os.get_inheritable, fds))
            frames.append((f.kind, f.id, payload, fds))
            self.lib.afork_link_take(self.link)
        return frames

    def take(self):
        """Receive all there is; return the frames, and the error or ""."""
        frames = []
        while (r := self.fill()) > 0:
            frames += self.ready()
        return frames, ERRORS[r] if r else ""


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module")
def files():
    """Descriptors that are told apart by their inode."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(4)]
        yield [f.fileno() for f in opened]


def close_all(files, frames):
    """Close the descriptors of frames; put in their place which file it was."""
    inodes = [os.fstat(fd).st_ino for fd in files]
    named = []
    for kind, number, payload, fds in frames:
        which = tuple(inodes.index(os.fstat(fd).st_ino) for fd in fds)
        named.append((kind, number, payload, which))
        for fd in fds:
            os.close(fd)
    return named


# -- receiving

indices = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@st.composite
def streams(draw):
    """(byte, indices of descriptors on it) pairs: mostly frames, some broken."""
    stream = []
    for _ in range(draw(st.integers(0, 6))):
        fds = draw(st.just(()) | indices)
        payload = draw(st.binary(max_size=12))
        number = draw(st.integers(0, 2**64 - 1))
        data = link_frame(draw(st.integers(0, 255)), number, payload, len(fds))
        stream += [(data[0], fds), *((byte, ()) for byte in data[1:])]
    faults = st.sampled_from(["", "", "", "byte", "fds", "drop", "add"])
    match draw(faults) if stream else "":
        case "byte":
            at = draw(st.integers(0, len(stream) - 1))
            stream[at] = (draw(st.integers(0, 255)), stream[at][1])
        case "fds":
            at = draw(st.integers(0, len(stream) - 1))
            stream[at] = (stream[at][0], draw(indices))
        case "drop":
            del stream[draw(st.integers(0, len(stream) - 1))]
        case "add":
            at = draw(st.integers(0, len(stream)))
            stream.insert(at, (draw(st.integers(0, 255)), ()))
    return stream


def chunks(stream, cuts):
    """Cut a stream into sends: descriptors only on the first byte of one."""
    start = 0
    for at in range(1, len(stream) + 1):
        if at == len(stream) or at in cuts or stream[at][1]:
            part = stream[start:at]
            yield bytes(byte for byte, _ in part), part[0][1]
            start = at


def pairs(data, fds=()):
    return [(data[0], fds), *((byte, ()) for byte in data[1:])]


# Descriptors on the first and on the second frame, both in one recvmsg.
EARLY = [*pairs(link_frame(1), (1,)), *pairs(link_frame(2, nfds=1))]
# On the last byte of a head; on two bytes of one; on the first of one and of
# the next, where the second recvmsg gets the end of the one as well.
LATE = [*pairs(link_frame(1, nfds=1)[:-1]), (0, (1,))]
TWICE = [*pairs(link_frame(1, nfds=2)[:8], (1,)), *pairs(bytes(8), (1,))]
NEXT = [*pairs(link_frame(1, nfds=1), (1,)), *pairs(link_frame(2, nfds=2), (2, 3))]


@bounded
@given(
    stream=streams(),
    cuts=st.sets(st.integers(1, 150)),
    polls=st.integers(0, 2**40 - 1),
    eof=st.booleans(),
    io_max=st.sampled_from([0, 0, 1, 3, 20]),
    interrupted=st.booleans(),
)
@example([], set(), 0, True, 0, False)
@example(EARLY, set(), 0, False, 0, False)
@example(EARLY, {16}, -1, False, 0, False)
@example(LATE, set(), 0, False, 0, False)
@example(LATE, {1, 2}, -1, False, 0, False)
@example(TWICE, set(), 0, False, 0, False)
@example(TWICE, set(), -1, False, 0, False)
@example(NEXT, set(), 0, False, 3, False)
def test_split_invariance(
    ffi, lib, files, stream, cuts, polls, eof, io_max, interrupted
):
    """Any chunking of bytes and descriptors gives the reference's frames."""
    before = open_fds()
    lib.shim_reset()
    expected = LinkReader()
    found, stopped, sent = [], "", []
    with End(ffi, lib) as end:
        lib.shim.io_max = io_max
        lib.shim.eintr_every = 2 if interrupted else 0

        def collect():
            nonlocal stopped
            for data, fds in recvmsgs(sent, io_max or KEPT):
                expected.feed(data, fds)
            sent.clear()
            if not stopped:
                frames, stopped = end.take()
                found.extend(close_all(files, frames))
            assert (found, stopped) == (expected.frames, expected.error)

        for n, (data, fds) in enumerate(chunks(stream, cuts)):
            socket.send_fds(end.peer, [data], [files[i] for i in fds])
            sent.append((data, fds))
            if polls >> n % 40 & 1:
                collect()
        collect()
        event(stopped or "no error")
        if eof and not stopped:
            end.peer.shutdown(socket.SHUT_WR)
            assert end.take() == ([], "EPIPE")
            stopped = "EPIPE"
        if stopped:  # and it stays so, with nothing open
            assert end.take() == ([], stopped)
            assert open_fds() == before + 2
    assert open_fds() == before


@bounded
@given(streams().filter(bool), st.data())
def test_exact_streams_do_not_depend_on_cuts(ffi, lib, files, stream, data):
    """What is right byte by byte is right in every other way too."""
    exact = LinkReader()
    for byte, fds in stream:
        exact.feed(bytes([byte]), fds)
    event(exact.error or "no error")
    cuts = data.draw(st.sets(st.integers(1, len(stream))))
    joined = LinkReader()
    for part, fds in recvmsgs(chunks(stream, cuts)):
        joined.feed(part, fds)
    if not exact.error:
        assert joined == exact
    # And otherwise: only where a descriptor came too early can it not be told.
    common = min(len(exact.frames), len(joined.frames))
    assert joined.frames[:common] == exact.frames[:common]


@pytest.mark.parametrize("nfds", [0, 1, 2])
def test_end_of_file_at_every_position(ffi, lib, files, nfds):
    before = open_fds()
    data = link_frame(7, 8, b"abc", nfds)
    for cut in range(len(data) + 1):
        with End(ffi, lib) as end:
            end.peer.sendall(link_frame(1))
            if cut:
                socket.send_fds(end.peer, [data[:cut]], files[:nfds])
            end.peer.close()
            frames, error = end.take()
            assert error == "EPIPE"
            expected = [(1, 0, b"", ()), (7, 8, b"abc", (0, 1)[:nfds])]
            whole = cut == len(data)
            assert close_all(files, frames) == expected[: 1 + whole]
    assert open_fds() == before


def test_death_with_our_bytes_unread(ffi, lib):
    """The kernel says ECONNRESET then: it is an end of file like another."""
    with End(ffi, lib) as end:
        end.send(1)
        assert end.flush() == 1
        end.peer.sendall(link_frame(2))
        end.peer.close()
        assert end.take() == ([(2, 0, b"", [])], "EPIPE")


@pytest.mark.parametrize(
    "head",
    [
        LINK_HEAD.pack(LINK_FRAME_MAX + 1, 0, 0, 0, 0),
        LINK_HEAD.pack(2**32 - 1, 0, 0, 0, 0),
        LINK_HEAD.pack(0, 0, 0, 1, 0),
        LINK_HEAD.pack(0, 0, 0, 0x8000, 0),
        LINK_HEAD.pack(0, 0, 1, 0, 0),
        LINK_HEAD.pack(0, 0, 255, 0, 0),
    ],
)
def test_bad_head(ffi, lib, head):
    """What was complete before it is not lost."""
    with End(ffi, lib) as end:
        end.peer.sendall(link_frame(1, 2, b"good") + head)
        assert end.take() == ([(1, 2, b"good", [])], "EPROTO")
        end.peer.sendall(link_frame(1))
        assert end.take() == ([], "EPROTO")


@pytest.mark.parametrize(
    ("announced", "sent"), [(1, 2), (2, 1), (0, 1), (253, 252), (252, 253), (255, 253)]
)
def test_wrong_number(ffi, lib, announced, sent):
    before = open_fds()
    with End(ffi, lib) as end:
        socket.send_fds(end.peer, [link_frame(1, nfds=announced)], [0] * sent)
        frames, error = end.take()
        # Which of the frames in one recvmsg they came with is not known.
        assert frames == ([] if announced else [(1, 0, b"", [])])
        assert error == "EPROTO"
        assert open_fds() == before + 2
    assert open_fds() == before


def test_many(ffi, lib, files):
    """As many as the kernel sends at once, in frames behind each other."""
    before = open_fds()
    with End(ffi, lib) as end, End(ffi, lib) as other:
        counts = [253, 1, 0, 253, 0, 252]
        for n, count in enumerate(counts):
            assert end.send(n, n, b"x" * n, [files[n % 4]] * count) == 0
        assert end.send(1, 1, b"", [0] * 254) == -errno.EINVAL
        # From one link to another: through the sockets of both.
        os.dup2(end.peer.fileno(), other.link.fd)
        assert end.flush() == 1
        frames, error = other.take()
        assert error == ""
        expected = [(n, n, b"x" * n, (n % 4,) * c) for n, c in enumerate(counts)]
        assert close_all(files, frames) == expected
    assert open_fds() == before


def test_fill_waits_for_taking(ffi, lib, files):
    """So no peer can make it hold more than a frame and a recvmsg."""
    with End(ffi, lib) as end:
        for _ in range(3):
            socket.send_fds(end.peer, [link_frame(nfds=2)], files[:2])
        for n in range(3):
            assert end.fill() == 1
            assert end.fill() == 1
            assert lib.shim.recvs == n + 1
            ((_, _, _, fds),) = end.ready()
            for fd in fds:
                os.close(fd)
        assert end.fill() == 0


def test_waiting_returns_when_interrupted(ffi, lib):
    with End(ffi, lib) as end:
        lib.shim.eintr_every = 2
        end.peer.sendall(link_frame(1))
        assert end.fill(wait=1) == 1
        assert len(end.ready()) == 1
        assert end.fill(wait=1) == -errno.EINTR
        end.peer.sendall(link_frame(2))
        assert end.fill(wait=1) == 1


def test_waiting_on_a_non_blocking_socket(ffi, lib):
    with End(ffi, lib) as end:
        os.set_blocking(end.link.fd, False)
        assert end.fill(wait=1) == 0


def test_memory_grows_with_what_arrives(ffi, lib):
    """A head that announces much costs nothing until it comes."""
    payload = bytes(range(256)) * (LINK_FRAME_MAX // 256)
    with End(ffi, lib) as end:
        end.peer.sendall(LINK_HEAD.pack(LINK_FRAME_MAX, 0, 0, 0, 0) + b"x")
        assert end.take() == ([], "")
        assert end.link.cap == KEPT
    with End(ffi, lib) as end:
        data = link_frame(1, 2, payload) + link_frame(3, 4, b"y")
        total, frames = len(data), []
        end.peer.setblocking(False)
        while data:
            with contextlib.suppress(BlockingIOError):
                data = data[end.peer.send(data) :]
            frames += end.take()[0]
            assert end.link.cap <= max(KEPT, 2 * (total - len(data)))
            assert end.link.cap <= len(payload) + 16 + KEPT
        assert frames == [(1, 2, payload, []), (3, 4, b"y", [])]
        assert end.link.cap <= KEPT  # given back


@pytest.mark.parametrize("size", [0, 1, 40_000, 48_000, 65_000, 65_536, 200_000])
def test_sizes_around_the_buffer(ffi, lib, size):
    """Where frames lie in the buffer does not matter to them."""
    with End(ffi, lib) as end:
        payload = os.urandom(size)
        expected, frames, data = [], [], b""
        for n in range(8):
            data += link_frame(n, n, payload) + link_frame(n, n, b"small")
            expected += [(n, n, payload, []), (n, n, b"small", [])]
        end.peer.setblocking(False)
        while data:
            with contextlib.suppress(BlockingIOError):
                data = data[end.peer.send(data) :]
            frames += end.take()[0]
        assert frames == expected


def test_no_memory_to_receive(ffi, lib, files):
    """-ENOMEM is the one error after which the link still works."""
    payload = b"x" * 300_000
    with End(ffi, lib) as end:
        end.peer.setblocking(False)
        data, frames, failed = link_frame(1, 2, payload, 1), [], 0
        end.peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        assert socket.send_fds(end.peer, [data], files[:1]) == len(data)
        while not frames:
            lib.shim.alloc_fail_at = 1
            r = end.fill()
            if r == -errno.ENOMEM:
                failed += 1
                lib.shim.alloc_fail_at = 0
                r = end.fill()
            assert r == 1
            frames = end.ready()
        lib.shim.alloc_fail_at = 0
        assert failed > 2
        assert close_all(files, frames) == [(1, 2, payload, (0,))]


def test_no_free_slot(script):
    """Some or all of the descriptors are lost: the frame cannot be had."""
    script(
        """
        import errno, resource, socket
        free = os.dup(0)
        os.close(free)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        frame = ffi.new("struct afork_link_frame *")
        for sent, room in (1, 0), (2, 0), (2, 1), (253, 100), (253, 252), (2, 2):
            theirs, ours = socket.socketpair()
            link = ffi.new("struct afork_link *")
            lib.afork_link_init_take(link, ours.detach())
            socket.send_fds(theirs, [link_frame(1), ], [])
            socket.send_fds(theirs, [link_frame(2, nfds=sent)], [0] * sent)
            limit = free + 2 + room
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            r = lib.afork_link_fill(link, 0)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + 600, hard))
            assert r == lib.afork_link_peek(link, frame) == 1
            assert (frame.kind, frame.nfds) == (1, 0)
            lib.afork_link_take(link)
            if room == sent:
                assert lib.afork_link_peek(link, frame) == 1
            else:
                assert lib.afork_link_fill(link, 0) == -errno.EMFILE
            lib.afork_link_free(link)
            theirs.close()
            now = os.dup(0)
            assert now == free, "something stayed open"
            os.close(now)
        """
    )


# -- sending

frames = st.lists(
    st.tuples(
        st.integers(0, 255),
        st.integers(0, 2**64 - 1),
        st.binary(max_size=20),
        st.just(()) | indices,
    ),
    max_size=12,
)


@bounded
@given(frames)
@example([])
@example([(1, 1, b"", (0, 1)), (2, 2, b"", (2,)), (3, 3, b"", ())])
def test_few_sends(ffi, lib, files, content):
    """One for each frame with descriptors, and one for plain ones before."""
    lib.shim_reset()
    with End(ffi, lib) as end:
        expected = b""
        for kind, number, payload, fds in content:
            assert end.send(kind, number, payload, [files[i] for i in fds]) == 0
            expected += link_frame(kind, number, payload, len(fds))
        assert lib.afork_outq_len(ffi.addressof(end.link, "out")) == len(expected)
        assert end.flush() == 1
        carry = [bool(fds) for *_, fds in content]
        assert lib.shim.sends == sum(carry) + (carry[:1] == [False])
        assert lib.shim.fds_sent == sum(carry)
        got, received = b"", []
        while len(got) < len(expected):
            part, fds, flags, _ = socket.recv_fds(end.peer, 1 << 16, 9)
            assert not flags & socket.MSG_CTRUNC
            got += part
            received += fds
        assert got == expected
        wanted = tuple(i for *_, fds in content for i in fds)
        assert close_all(files, [(0, 0, b"", received)]) == [(0, 0, b"", wanted)]


@bounded
@given(
    rounds=st.lists(frames, min_size=1, max_size=4),
    io_max=st.integers(0, 40),
    eintr=st.sampled_from([0, 2, 3]),
    eagain=st.sampled_from([0, 2, 5]),
)
def test_short_interrupted_and_full(ffi, lib, files, rounds, io_max, eintr, eagain):
    """Nothing is lost or doubled between two links, also when cut half-way."""
    before = open_fds()
    lib.shim_reset()
    with End(ffi, lib) as end, End(ffi, lib) as other:
        os.dup2(end.peer.fileno(), other.link.fd)
        lib.shim.io_max, lib.shim.eintr_every = io_max, eintr
        lib.shim.eagain_every = eagain
        found = []

        def move():
            done = end.flush()
            assert done in (0, 1)
            frames, error = other.take()
            assert error == ""
            found.extend(close_all(files, frames))
            return done

        for content in rounds:
            for kind, number, payload, fds in content:
                assert end.send(kind, number, payload, [files[i] for i in fds]) == 0
            move()
        calls = 0
        while not move() or len(found) < sum(map(len, rounds)):
            calls += 1
            assert calls < 10_000
        assert found == [frame for content in rounds for frame in content]
    assert open_fds() == before


def test_big_frame_through_a_full_socket(ffi, lib, files):
    payload = os.urandom(LINK_FRAME_MAX)
    with End(ffi, lib) as end, End(ffi, lib) as other:
        os.dup2(end.peer.fileno(), other.link.fd)
        assert end.send(1, 1, b"before") == 0
        assert end.send(2, 2, payload, files) == 0
        assert end.send(3, 3, b"behind", files[:1]) == 0
        assert end.flush() == 0
        found = []
        while end.flush() == 0:
            found += other.take()[0]
        found += other.take()[0]
        assert close_all(files, found) == [
            (1, 1, b"before", ()),
            (2, 2, payload, (0, 1, 2, 3)),
            (3, 3, b"behind", (0,)),
        ]
        assert end.link.out.cap == 0  # given back


def test_descriptors_are_duplicated(ffi, lib, files):
    """All or none; the caller's may be closed at once."""
    before = open_fds()
    with End(ffi, lib) as end:
        fd = os.dup(files[0])
        assert end.send(1, 1, b"", [fd]) == 0
        os.close(fd)
        for bad in (1 << 20, -1):
            assert end.send(2, 2, b"", [*files, bad]) == -errno.EBADF
        assert open_fds() == before + 2 + 1
        assert end.flush() == 1
        assert open_fds() == before + 2
        _, fds, _, _ = socket.recv_fds(end.peer, 100, 9)
        assert close_all(files, [(0, 0, b"", fds)])[0][3] == (0,)
        # Those not sent are closed with the link.
        assert end.send(1, 1, b"", files) == 0
    assert open_fds() == before


def test_limit_on_descriptors(script):
    script(
        """
        import errno, resource, socket
        theirs, ours = socket.socketpair()
        link = ffi.new("struct afork_link *")
        lib.afork_link_init_take(link, ours.detach())
        free = os.dup(0)
        os.close(free)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 2, hard))
        fds = ffi.new("int[]", 3)
        r = lib.afork_link_send(link, 1, 1, b"", 0, fds, 3)
        assert r == -errno.EMFILE
        assert os.dup(0) == free
        assert lib.afork_link_flush(link) == 1
        """
    )


def test_cap(ffi, lib, files):
    before = open_fds()
    with End(ffi, lib) as end:
        big = ffi.new("uint8_t[]", LINK_FRAME_MAX + 1)
        for size in (LINK_FRAME_MAX + 1, 2**32, 2**64 - 1):
            r = lib.afork_link_send(end.link, 0, 0, big, size, files, 4)
            assert r == -errno.E2BIG
        assert open_fds() == before + 2
        r = lib.afork_link_send(end.link, 0, 0, big, LINK_FRAME_MAX, files, 0)
        assert r == 0


def test_in_flight_limit_is_a_full_socket(ffi, lib, files):
    with End(ffi, lib) as end:
        assert end.send(1, 1, b"", files) == 0
        lib.shim.send_errno = errno.ETOOMANYREFS
        assert end.flush() == 0
        lib.shim.send_errno = 0
        assert end.flush() == 1
        _, fds, _, _ = socket.recv_fds(end.peer, 100, 9)
        assert len(fds) == 4
        close_all(files, [(0, 0, b"", fds)])


def test_broken_socket(ffi, lib, files):
    before = open_fds()
    with End(ffi, lib) as end:
        assert end.send(1, 1, b"", files) == 0
        end.peer.close()
        assert end.flush() == -errno.EPIPE
        assert end.flush() == -errno.EPIPE
    assert open_fds() == before


def test_no_memory_to_send(ffi, lib, files):
    """Each allocation in turn fails: the stream stays one of whole frames."""
    for nth in range(1, 9):
        before = open_fds()
        with End(ffi, lib) as end:
            lib.shim_reset()
            lib.shim.alloc_fail_at = nth
            expected, failed, carried = b"", False, 0
            for n, size, count in ((1, 0, 1), (2, 30_000, 4), (3, 9, 100), (4, 9, 0)):
                fds = [files[0]] * count
                r = end.send(n, n, b"x" * size, fds)
                assert r in (0, -errno.ENOMEM)
                failed |= r < 0
                if r == 0:
                    expected += link_frame(n, n, b"x" * size, count)
                    carried += count
            assert open_fds() == before + 2 + carried
            done = lib.shim.alloc_fail_at > 0
            assert failed == (not done)
            assert end.flush() == 1
            got = b""
            while len(got) < len(expected):
                part, fds, _, _ = socket.recv_fds(end.peer, 1 << 16, 253)
                got += part
                close_all(files, [(0, 0, b"", fds)])
            assert got == expected
        assert open_fds() == before
        if done:
            return
    pytest.fail("more allocations than expected")


def test_a_long_list_of_descriptors_is_given_back(ffi, lib, files):
    with End(ffi, lib) as end:
        for _ in range(10):
            assert end.send(1, 1, b"", [files[0]] * 253) == 0
        out = end.link.out
        assert out.fds_cap >= 2530
        while end.flush() == 0:
            pass
        assert out.fds_cap == 0
        for _ in range(10):
            _, fds, _, _ = socket.recv_fds(end.peer, 100, 253)
            close_all(files, [(0, 0, b"", fds)])
