"""Frames out of a socket: however they are cut up, and whatever is wrong."""

import contextlib
import errno
import os
import socket
import struct
import tempfile

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from .reference import FRAME_MAX, TO_APPLICATION, TO_PROCESS, Reader, frame

ERRORS = {-errno.EPROTO: "EPROTO", -errno.EMSGSIZE: "EMSGSIZE", -errno.EPIPE: "EPIPE"}

bounded = settings(max_examples=2000, deadline=None, database=None, print_blob=True)


class Reading:
    """A C reader on one end of a socket; `ours` is the other."""

    def __init__(self, ffi, lib, direction=None, frame_max=None):
        self.ffi, self.lib = ffi, lib
        self.ours, self.theirs = socket.socketpair()
        self.reader = ffi.new("struct afork_reader *")
        lib.afork_reader_init(self.reader, direction or lib.AFORK_TO_PROCESS)
        if frame_max is not None:
            self.reader.frame_max = frame_max
        self.out = ffi.new("struct afork_frame *")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.ours.close()
        self.theirs.close()
        self.lib.afork_reader_free(self.reader)

    def send(self, data, *fds):
        socket.send_fds(self.ours, [data], fds)

    def next(self) -> int:
        return self.lib.afork_reader_next(self.reader, self.theirs.fileno(), self.out)

    def take(self):
        """Return the frames that are complete, and the error if there was one."""
        frames = []
        while (r := self.next()) > 0:
            out = self.out
            payload = self.ffi.buffer(out.payload, out.len)[:] if out.len else b""
            frames.append((out.letter, payload, out.fd))
        return frames, ERRORS[r] if r else ""


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module")
def files():
    """Descriptors that are told apart by their inode."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(4)]
        yield [f.fileno() for f in opened]


@st.composite
def streams(draw, carry):
    """(byte, indices of descriptors on it) pairs: mostly frames, some broken."""
    letters = st.sampled_from(b"ehhFFfrps")
    stream = []
    for _ in range(draw(st.integers(0, 6))):
        letter = draw(letters)
        payload = draw(st.binary(max_size=12))
        data = struct.pack("=BI", letter, len(payload)) + payload
        stream += [(byte, ()) for byte in data]
        if letter in carry and draw(st.integers(0, 15)):
            fds = (draw(st.integers(0, 3)),)
            if carry[letter] == "behind":
                stream.append((0, fds))
            else:
                stream[-len(data)] = (letter, fds)
    faults = st.sampled_from(["", "", "", "byte", "fds", "drop", "add"])
    match draw(faults) if stream else "":
        case "byte":
            at = draw(st.integers(0, len(stream) - 1))
            stream[at] = (draw(st.integers(0, 255)), stream[at][1])
        case "fds":
            at = draw(st.integers(0, len(stream) - 1))
            fds = draw(st.lists(st.integers(0, 3), max_size=3))
            stream[at] = (stream[at][0], tuple(fds))
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


ways = st.sampled_from([TO_PROCESS, TO_APPLICATION])

# The descriptor on the last byte of a header.
LATE = [*((byte, ()) for byte in b"F\0\0\0"), (0, (1,))]


@bounded
@given(
    way=ways.flatmap(lambda carry: st.tuples(st.just(carry), streams(carry))),
    cuts=st.sets(st.integers(1, 100)),
    polls=st.integers(0, 2**40 - 1),
    eof=st.booleans(),
    frame_max=st.sampled_from([FRAME_MAX, FRAME_MAX, 8]),
    io_max=st.sampled_from([0, 0, 1, 3]),
    interrupted=st.booleans(),
)
@example((TO_PROCESS, []), set(), 0, True, FRAME_MAX, 0, False)
@example((TO_PROCESS, LATE), set(), 0, False, FRAME_MAX, 0, False)
@example((TO_PROCESS, LATE), {1, 2}, -1, False, FRAME_MAX, 0, False)
def test_split_invariance(
    ffi, lib, files, way, cuts, polls, eof, frame_max, io_max, interrupted
):
    """T1b: any chunking of bytes and descriptors gives the reference's frames."""
    carry, stream = way
    expected = Reader(carry, frame_max)
    for byte, fds in stream:
        expected.feed(byte, fds)
    error = expected.error or ("EPIPE" if eof else "")
    event(error or "no error")

    before = open_fds()
    lib.shim_reset()
    to_process = carry is TO_PROCESS
    direction = lib.AFORK_TO_PROCESS if to_process else lib.AFORK_TO_APPLICATION
    inodes = [os.fstat(fd).st_ino for fd in files]
    found, stopped = [], ""
    with Reading(ffi, lib, direction, frame_max) as r:
        lib.shim.io_max = io_max
        lib.shim.eintr_every = 2 if interrupted else 0

        def collect():
            nonlocal stopped
            if stopped:
                return
            frames, stopped = r.take()
            for letter, payload, fd in frames:
                if fd >= 0:
                    assert not os.get_inheritable(fd)
                    index = inodes.index(os.fstat(fd).st_ino)
                    os.close(fd)
                else:
                    assert fd == lib.AFORK_NOFD
                    index = None
                found.append((letter, payload, index))

        for n, (data, fds) in enumerate(chunks(stream, cuts)):
            socket.send_fds(r.ours, [data], [files[i] for i in fds])
            if polls >> n % 40 & 1:
                collect()
        if eof:
            r.ours.shutdown(socket.SHUT_WR)
        collect()
    assert found == expected.frames
    assert stopped == error
    assert open_fds() == before


@pytest.mark.parametrize("fault", ["", "short", "eintr", "eagain"])
def test_end_of_file_at_every_position(ffi, lib, files, fault):
    data = frame(b"e", b"abc") + frame(b"h")
    whole = len(data) + 1
    for cut in range(whole + 1):
        lib.shim_reset()
        lib.shim.io_max = fault == "short"
        lib.shim.eintr_every = 2 * (fault == "eintr")
        with Reading(ffi, lib) as r:
            r.ours.sendall(data[:cut])
            if cut == whole:
                socket.send_fds(r.ours, [b"\0"], files[:1])
            r.ours.close()
            lib.shim.eagain_every = 3 * (fault == "eagain")
            frames, error = [], ""
            while not error:
                more, error = r.take()
                frames += more
            assert error == "EPIPE"
            assert len(frames) == (cut >= 8) + (cut == whole)
            for _, _, fd in frames:
                if fd >= 0:
                    os.close(fd)


def test_death_with_our_bytes_unread(ffi, lib):
    """The kernel says ECONNRESET then: it is an end of file like another."""
    with Reading(ffi, lib) as r:
        r.theirs.sendall(b"unread")
        r.send(frame(b"e", b"x"))
        r.ours.close()
        assert r.take() == ([(ord("e"), b"x", lib.AFORK_NOFD)], "EPIPE")


def test_nothing_is_read_behind_the_frame(ffi, lib, files):
    with Reading(ffi, lib) as r:
        for data in (frame(b"r", b"f"), frame(b"e")):
            r.send(data + b"users bytes")
            assert r.next() == 1
            assert r.theirs.recv(100) == b"users bytes"
        r.send(frame(b"h"))
        r.send(b"\0users bytes", files[0])
        assert r.next() == 1
        os.close(r.out.fd)
        assert r.theirs.recv(100) == b"users bytes"


@st.composite
def reports(draw):
    """Reports as they are sent: (bytes, whether a descriptor is on the first)."""
    sends = []
    for _ in range(draw(st.integers(0, 8))):
        letter = bytes([draw(st.sampled_from(b"pepcxds"))])
        data = draw(st.binary(max_size=20))
        sends.append((frame(letter, data), letter in b"pcs"))
    return sends


@given(
    sends=reports(),
    ahead=st.integers(1, 64),
    once=st.booleans(),
    pauses=st.sets(st.integers(0, 8)),
)
@settings(max_examples=500, deadline=None, database=None, print_blob=True)
def test_reading_ahead_finds_the_same_frames(
    ffi, lib, files, sends, ahead, once, pauses
):
    before = open_fds()
    with Reading(ffi, lib, lib.AFORK_TO_APPLICATION) as reading:
        lib.afork_reader_ahead(reading.reader, ahead, once)
        found = []
        for number, (data, carries) in enumerate(sends):
            reading.send(data, *files[:carries])
            if number in pauses:
                frames, error = reading.take()
                assert not error
                assert not lib.afork_reader_has_early(reading.reader)
                found += frames
        frames, error = reading.take()
        assert not error
        found += frames
        assert [(frame(bytes([x]), y), fd >= 0) for x, y, fd in found] == sends
        for _, _, fd in found:
            if fd >= 0:
                assert os.path.sameopenfile(fd, files[0])
                os.close(fd)
    assert open_fds() == before


def test_reading_ahead_once_stops_where_it_was_told(ffi, lib, files):
    with Reading(ffi, lib, lib.AFORK_TO_APPLICATION) as reading:
        lib.afork_reader_ahead(reading.reader, 14, 1)
        reading.send(frame(b"p", b"pidx") + frame(b"r", b"") + b"user", files[0])
        assert reading.next() == 1
        os.close(reading.out.fd)
        assert lib.afork_reader_has_early(reading.reader)
        assert reading.next() == 1
        assert reading.out.letter == ord("r")
        assert not lib.afork_reader_has_early(reading.reader)
        assert reading.theirs.recv(10) == b"user"
        # Exactly from here on.
        reading.send(frame(b"d", b"t") + b"more")
        assert reading.next() == 1
        assert reading.theirs.recv(10) == b"more"


@pytest.mark.parametrize(
    "sends",
    [
        [(b"d\0\0\0\0", 1)],  # on a frame that carries none
        [(b"d\0\0\0\0e\0\0\0\0", 1)],
        [(b"d\4\0\0\0ab", 0), (b"cd", 1)],  # on a payload
        [(b"p\0\0\0\0p\0\0\0\0", 1)],  # one for two
        [(b"p\0\0\0\0", 0)],  # none
        [(b"p\0\0\0\0", 2)],
        [(b"p\0\0", 1), (b"\0\0", 1)],
    ],
)
@pytest.mark.parametrize("ahead", [7, 64])
def test_wrong_descriptors_ahead(ffi, lib, files, sends, ahead):
    before = open_fds()
    with Reading(ffi, lib, lib.AFORK_TO_APPLICATION) as reading:
        lib.afork_reader_ahead(reading.reader, ahead, 0)
        error = ""
        for data, count in sends:
            reading.send(data, *files[:count])
            frames, error = reading.take()
            for _, _, fd in frames:
                if fd >= 0:
                    os.close(fd)
        assert error == "EPROTO"
    assert open_fds() == before


def test_cap(ffi, lib):
    with Reading(ffi, lib, frame_max=4) as r:
        r.ours.sendall(frame(b"e", b"1234") + frame(b"e", b"12345"))
        assert r.take() == ([(ord("e"), b"1234", lib.AFORK_NOFD)], "EMSGSIZE")
        assert r.take() == ([], "EMSGSIZE")  # and it stays so
    for length in (FRAME_MAX + 1, 2**31 - 1, 2**31, 2**32 - 1):
        with Reading(ffi, lib) as r:
            r.ours.sendall(struct.pack("=BI", ord("e"), length))
            assert r.take() == ([], "EMSGSIZE")
            assert r.reader.payload_cap == 0


def test_lent_memory_is_outgrown_and_taken_again(ffi, lib):
    small, large = bytes(range(40)), bytes(range(250)) * 400
    lent = ffi.new("uint8_t[]", 41)
    with Reading(ffi, lib) as r:
        lib.afork_reader_lend(r.reader, lent, 40)
        for payload in (small, small + b"x", large, small):
            r.ours.sendall(frame(b"e", payload[:30]))
            r.ours.sendall(frame(b"e", payload))
            assert r.take()[0] == [(ord("e"), p, -1) for p in (payload[:30], payload)]
            assert (r.reader.payload == lent) is (len(payload) <= 40)
            assert r.reader.payload_cap >= len(payload)
        assert lent[40] == 0


def test_memory_grows_with_what_arrives(ffi, lib):
    """A header that announces 16 MiB costs nothing until they come."""
    payload = bytes(range(256)) * 4096
    with Reading(ffi, lib) as r:
        r.ours.setblocking(False)
        r.ours.sendall(struct.pack("=BI", ord("e"), FRAME_MAX) + b"x")
        assert r.take() == ([], "")
        assert r.reader.payload_cap <= 1 << 16
    with Reading(ffi, lib) as r:
        data = frame(b"e", payload) + frame(b"a", b"y")
        frames = []
        r.ours.setblocking(False)
        while data:
            with contextlib.suppress(BlockingIOError):
                data = data[r.ours.send(data) :]
            frames += r.take()[0]
            assert r.reader.payload_cap <= len(payload)
        assert frames == [(ord("e"), payload, -1), (ord("a"), b"y", -1)]
        assert r.reader.payload_cap <= 1 << 16  # the big one is given back


def test_empty_payload_between_others(ffi, lib):
    with Reading(ffi, lib) as r:
        r.ours.sendall(frame(b"a") + frame(b"a", b"x") + frame(b"f"))
        assert r.take() == (
            [(ord("a"), b"", -1), (ord("a"), b"x", -1), (ord("f"), b"", -1)],
            "",
        )


@pytest.mark.parametrize(
    ("byte", "count"), [(b"\0", 0), (b"\0", 2), (b"\0", 253), (b"x", 0), (b"x", 1)]
)
def test_wrong_descriptor_byte(ffi, lib, files, byte, count):
    before = open_fds()
    with Reading(ffi, lib) as r:
        r.ours.sendall(frame(b"h"))
        socket.send_fds(r.ours, [byte], [files[0]] * count)
        assert r.take() == ([], "EPROTO")
        r.ours.sendall(frame(b"e", b"good"))
        assert r.take() == ([], "EPROTO")  # and it stays so
    assert open_fds() == before


@pytest.mark.parametrize("at", range(9))
def test_descriptor_where_none_belongs(ffi, lib, files, at):
    before = open_fds()
    data = frame(b"e", b"1234")
    with Reading(ffi, lib) as r:
        r.ours.sendall(data[:at])
        socket.send_fds(r.ours, [data[at:]], files[:1])
        assert r.take() == ([], "EPROTO")
    assert open_fds() == before


def test_descriptor_on_the_first_byte(ffi, lib, files):
    """It is kept until the frame is whole, and let go of if it never is."""
    before = open_fds()
    data = frame(b"F", b"12345678")
    for cut in range(1, len(data)):
        with Reading(ffi, lib) as r:
            r.send(data[:cut], files[0])
            assert r.take() == ([], "")
            assert open_fds() == before + 3
            r.send(data[cut:])
            frames, error = r.take()
            ((letter, payload, fd),) = frames
            assert (letter, payload, error) == (ord("F"), b"12345678", "")
            assert os.fstat(fd).st_ino == os.fstat(files[0]).st_ino
            os.close(fd)
        with Reading(ffi, lib) as r:
            r.send(data[:cut], files[0])
            assert r.take() == ([], "")
            r.lib.afork_reader_reset(r.reader)
            assert open_fds() == before + 2
            r.send(data, files[0])  # and it can be used again
            os.close(r.take()[0][0][2])
            r.send(data[:cut], files[0])
            assert r.take() == ([], "")
        assert open_fds() == before


def test_wrong_descriptors_in_a_header(ffi, lib, files):
    before = open_fds()
    data = frame(b"F", b"12345678")
    for first, second in ((0, 0), (2, 0), (1, 1), (253, 0), (0, 1), (0, 2), (1, 2)):
        with Reading(ffi, lib) as r:
            r.send(data[:2], *[files[0]] * first)
            r.send(data[2:], *[files[0]] * second)
            if (first, second) == (0, 1):  # see reference.Reader
                ((_, _, fd),), _ = r.take()
                os.close(fd)
            else:
                assert r.take() == ([], "EPROTO")
        assert open_fds() == before


def test_no_memory(ffi, lib):
    """-ENOMEM is the one error after which the stream still works."""
    with Reading(ffi, lib) as r:
        r.ours.sendall(frame(b"e", b"x" * 100))
        lib.shim.alloc_fail_at = 1
        with pytest.raises(KeyError, match=str(-errno.ENOMEM)):
            r.take()
        assert r.take() == ([(ord("e"), b"x" * 100, -1)], "")


def test_lost_descriptor(script):
    """With no free slot the byte arrives and the kernel drops the descriptor."""
    out = script(
        """
        import resource, socket, struct
        ours, theirs = socket.socketpair()
        reader = ffi.new("struct afork_reader *")
        lib.afork_reader_init(reader, lib.AFORK_TO_PROCESS)
        out = ffi.new("struct afork_frame *")

        def take():
            r = lib.afork_reader_next(reader, theirs.fileno(), out)
            return r, out.fd

        free = os.dup(0)
        os.close(free)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        for spare in 0, 1:
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + spare, hard))
            ours.sendall(frame(b"h", b"x"))
            socket.send_fds(ours, [b"\\0"], [0])
            r, fd = take()
            assert r == 1
            print(fd == lib.AFORK_LOSTFD, fd == free)
        os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        socket.send_fds(ours, [frame(b"F", b"y")], [0])
        assert take() == (1, lib.AFORK_LOSTFD)
        # the stream goes on behind it
        ours.sendall(frame(b"e", b"on"))
        assert take() == (1, lib.AFORK_NOFD)
        # Two on one byte with room for one, and with room for none.
        for spare in 1, 0:
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + spare, hard))
            ours.sendall(frame(b"h"))
            socket.send_fds(ours, [b"\\0"], [0, 0])
            print(take()[0])
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + 9, hard))
            print(os.dup(0) == free)
            os.close(free)
            lib.afork_reader_free(reader)
        """
    )
    lines = out.split("\n")
    assert lines[:2] == ["True False", "False True"]
    assert lines[2:4] == [str(-errno.EPROTO), "True"]
    # All cut off: one or two cannot be told apart, it is a lost one.
    assert lines[4:6] == ["1", "True"]
