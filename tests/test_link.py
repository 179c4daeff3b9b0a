"""Link, the type: calls that wait, threads, signals, and closing among them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from afork._afork import LINK_FRAME_MAX, Link, buffer_address

from .core.reference import LINK_HEAD, link_frame

HANG = 10.0
BAD = rf"\[Errno {errno.EBADF}\]"
PROTO = rf"\[Errno {errno.EPROTO}\]"


@pytest.fixture
def links() -> Iterator[tuple[Link, Link]]:
    left, right = (Link(sock.detach()) for sock in socket.socketpair())
    yield left, right
    left.close()
    right.close()


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Link]]:
    """A socket, and a link at its other end."""
    sock, other = socket.socketpair()
    link = Link(other.detach())
    with sock:
        yield sock, link
    link.close()


class Thread(threading.Thread):
    """Gives back what its function returned or raised."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        super().__init__(daemon=True)
        self.function, self.args = function, args
        self.start()

    def run(self) -> None:
        try:
            self.result, self.error = self.function(*self.args), None
        except BaseException as e:
            self.result, self.error = None, e

    def wait(self) -> object:
        self.join(HANG)
        assert not self.is_alive(), "it hangs"
        if self.error:
            raise self.error
        return self.result

    def sleeps_in_kernel(self) -> None:
        """Return when the thread waits for something that is not the GIL."""
        end = time.monotonic() + HANG
        while time.monotonic() < end:
            with open(f"/proc/self/task/{self.native_id}/wchan") as f:
                where = f.read()
            if "unix" in where or "poll" in where:
                return
            # Without a wchan (a hardened kernel): long enough in all likelihood.
            if where in ("", "0"):
                time.sleep(0.1)
                return
            time.sleep(0.001)
        raise AssertionError("it does not wait")


def fill(link: Link) -> None:
    """Queue more than the socket takes."""
    while link.flush():
        link.send(9, 0, b"x" * 100_000)


def fds_closed(frames: list[tuple[int, int, bytes, tuple[int, ...]]]) -> list[int]:
    """Close the descriptors; return how many each of the frames had."""
    for *_, fds in frames:
        for fd in fds:
            os.close(fd)
    return [len(fds) for *_, fds in frames]


# -- frames


def test_round_trip(links):
    left, right = links
    left.send(1, 2, b"three")
    left.send(255, 2**64 - 1, bytearray(b"four"), ())
    left.send(0, 0, memoryview(b""), [])
    assert left.queued == 3 * 16 + 9
    assert left.flush() is True
    assert left.queued == 0
    assert right.receive() == [
        (1, 2, b"three", ()),
        (255, 2**64 - 1, b"four", ()),
        (0, 0, b"", ()),
    ]
    assert right.receive() == []
    assert not right.eof
    right.send(1, 1, b"back")
    right.flush(True)
    assert left.receive(True) == [(1, 1, b"back", ())]


def test_descriptors(links, tmp_path):
    left, right = links
    with open(tmp_path / "a", "w") as a, open(tmp_path / "b", "w") as b:
        left.send(1, 1, b"", (a.fileno(), b.fileno()))
        left.send(2, 2, b"", [a.fileno()])
        left.send(3, 3, b"")
        stat = os.fstat(a.fileno())
    assert left.flush()
    frames = []
    while len(frames) < 3:
        frames += right.receive()
    assert [len(fds) for *_, fds in frames] == [2, 1, 0]
    assert not any(os.get_inheritable(fd) for *_, fds in frames for fd in fds)
    assert os.path.samestat(os.fstat(frames[1][3][0]), stat)
    fds_closed(frames)


def test_many_descriptors(links):
    left, right = links
    left.send(1, 1, b"", [0] * 253)
    with pytest.raises(ValueError, match="more than 253 descriptors"):
        left.send(1, 1, b"", [0] * 254)
    assert left.flush()
    assert fds_closed(right.receive()) == [253]


def test_sending_without_receiving_leaves_nothing_open(links):
    """The leak guard looks at what is open afterwards."""
    left, right = links
    for _ in range(3):
        left.send(1, 1, b"", [0, 1])
    left.flush()
    assert fds_closed(right.receive()) == [2]
    left.send(1, 1, b"", [0, 1])


def test_big_frames(links):
    left, right = links
    payload = os.urandom(LINK_FRAME_MAX)
    thread = Thread(right.receive, True)
    left.send(1, 1, payload, [0])
    left.send(2, 2, b"small")
    assert left.flush(True) is True
    frames = thread.wait()
    while len(frames) < 2:
        frames += right.receive(True)
    assert fds_closed(frames) == [1, 0]
    assert frames[0][:3] == (1, 1, payload)
    assert frames[1] == (2, 2, b"small", ())
    with pytest.raises(ValueError, match="frame over the cap of 1048576 bytes"):
        left.send(1, 1, payload + b"x")
    assert left.queued == 0


def test_wrong_arguments(links):
    left, _ = links
    before = len(os.listdir("/proc/self/fd"))
    for bad in (-1, 256, 1 << 40):
        with pytest.raises(ValueError, match="kind"):
            left.send(bad, 1, b"")
    for bad in (-1, 1 << 64):
        with pytest.raises(OverflowError):
            left.send(1, bad, b"")
    for args in ((), (1, 1), (1, 1, b"", (), 5), (b"", 1, b""), (1, "", b"")):
        with pytest.raises(TypeError):
            left.send(*args)
    for payload in ("text", None, memoryview(b"1234")[::2]):
        with pytest.raises((TypeError, BufferError)):
            left.send(1, 1, payload)
    for fds in (None, 3, ["x"], [1.5]):
        with pytest.raises(TypeError):
            left.send(1, 1, b"", fds)
    for fds in ([0, -1], [0, 1 << 20], [0, 1 << 40]):
        with pytest.raises(OSError, match=BAD):
            left.send(1, 1, b"", fds)
    for limit in (0, -1):
        with pytest.raises(ValueError, match="limit"):
            left.receive(False, limit)
    with pytest.raises(TypeError):
        left.receive(False, "x")
    with pytest.raises(TypeError):
        left.flush(True, True)
    assert left.queued == 0
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_type():
    with pytest.raises(TypeError):
        Link()
    with pytest.raises(TypeError):
        Link("x")
    with pytest.raises(TypeError):
        Link(fd=3)
    with pytest.raises(OSError, match=BAD):
        Link(-1)
    with pytest.raises(TypeError):
        Link.more = 1


# -- limit, pending, end of file


def test_limit_and_pending(links):
    left, right = links
    for n in range(300):
        left.send(1, n, b"")
    left.flush()
    assert not right.pending  # nothing is read without being asked
    got = []
    for size, more in ((10, True), (128, True), (128, True), (34, False)):
        frames = right.receive(False, 10) if size == 10 else right.receive()
        assert len(frames) == size
        assert right.pending is more
        got += [n for _, n, _, _ in frames]
    assert got == list(range(300))


def test_buffered_frames_cost_no_call_of_the_kernel(raw):
    sock, link = raw
    sock.sendall(link_frame(1) * 3)
    assert len(link.receive(True, 1)) == 1
    sock.sendall(link_frame(2))
    # Also not when more than the buffered ones may be had.
    assert [kind for kind, *_ in link.receive(True)] == [1, 1]
    assert [kind for kind, *_ in link.receive(True)] == [2]


def test_one_frame_in_pieces(raw):
    sock, link = raw
    data = link_frame(1, 2, b"abc")
    for byte in data[:-1]:
        sock.sendall(bytes([byte]))
        assert link.receive() == []
        assert not link.pending
    sock.sendall(data[-1:])
    assert link.receive() == [(1, 2, b"abc", ())]


def test_waits_for_a_whole_frame(raw):
    sock, link = raw
    data = link_frame(1, 2, b"abc")
    thread = Thread(link.receive, True)
    for byte in data:
        thread.sleeps_in_kernel()
        sock.sendall(bytes([byte]))
    assert thread.wait() == [(1, 2, b"abc", ())]


@pytest.mark.parametrize("wait", [False, True])
def test_end_of_file(raw, wait):
    sock, link = raw
    sock.sendall(link_frame(1) + link_frame(2)[:9])
    sock.close()
    assert link.receive(wait) == [(1, 0, b"", ())]
    assert not link.eof
    assert link.receive(wait) == []
    assert link.eof
    assert link.receive(wait) == []
    assert not link.pending


def test_end_of_file_while_it_waits(links):
    left, right = links
    thread = Thread(right.receive, True)
    thread.sleeps_in_kernel()
    left.close()
    assert thread.wait() == []
    assert right.eof


def test_reset_is_end_of_file(links):
    left, right = links
    right.send(1, 1, b"unread")
    assert right.flush()
    left.close()
    assert right.receive(True) == []
    assert right.eof


def test_shutdown(links):
    left, right = links
    left.send(1, 1, b"last")
    left.flush()
    left.shutdown()
    assert len(right.receive(True)) == 1
    assert right.receive(True) == []
    assert right.eof
    right.send(1, 1, b"still")
    right.flush()
    assert len(left.receive(True)) == 1
    right.close()
    left.shutdown()


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("before", [0, 1])
def test_protocol_error(raw, wait, before):
    sock, link = raw
    open_before = len(os.listdir("/proc/self/fd"))
    bad = LINK_HEAD.pack(0, 0, 1, 0, 0)
    socket.send_fds(sock, [link_frame(1) * before + bad], [0, 0])
    if before:
        # What was good comes first, and says that there is more.
        assert link.receive(wait) == [(1, 0, b"", ())]
        assert link.pending
    for _ in range(2):
        with pytest.raises(OSError, match=PROTO):
            link.receive(wait)
    assert not link.eof
    assert len(os.listdir("/proc/self/fd")) == open_before


# -- flush


def test_full_socket(links):
    left, right = links
    fill(left)
    assert left.queued > 0
    assert left.flush() is False
    thread = Thread(left.flush, True)
    thread.sleeps_in_kernel()
    left.send(2, 0, b"while it waits")
    frames = []
    while not frames or frames[-1][0] != 2:
        frames += right.receive(True)
    assert thread.wait() is True
    assert left.queued == 0


@pytest.mark.parametrize("wait", [False, True])
def test_flush_to_nobody(links, wait):
    left, right = links
    right.close()
    left.send(1, 1, b"", [0])
    for _ in range(2):
        with pytest.raises(BrokenPipeError):
            left.flush(wait)
    assert left.queued == 16


def test_peer_ends_while_flush_waits(links):
    left, right = links
    fill(left)
    thread = Thread(left.flush, True)
    thread.sleeps_in_kernel()
    right.close()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        thread.wait()


def test_nothing_to_flush(links):
    left, _ = links
    assert left.flush() is True
    assert left.flush(True) is True


# -- threads


def test_send_while_another_thread_receives(links):
    left, right = links
    thread = Thread(left.receive, True)
    thread.sleeps_in_kernel()
    with pytest.raises(RuntimeError, match="receive"):
        left.receive()
    with pytest.raises(RuntimeError, match="in use"):
        left.detach()
    assert not left.pending
    left.send(1, 1, b"there")
    assert left.flush(True)
    assert len(right.receive(True)) == 1
    right.send(2, 2, b"back")
    right.flush(True)
    assert thread.wait() == [(2, 2, b"back", ())]


def test_both_directions_at_once(links):
    """Many frames, senders and sizes, more than the sockets take."""
    count, senders = 2000, 2
    payloads = [os.urandom(size) for size in (0, 1, 100, 5000)]

    def send(link: Link, first: int) -> None:
        for n in range(first, first + count):
            link.send(1, n, payloads[n % 4], [0] * (n % 100 == 0))
            link.flush(True)

    def receive(link: Link) -> None:
        seen: list[int] = []
        while len(seen) < count * senders:
            for _, n, payload, fds in link.receive(True):
                assert payload == payloads[n % 4]
                assert len(fds) == (n % 100 == 0)
                for fd in fds:
                    os.close(fd)
                seen.append(n)
        assert sorted(seen) == list(range(count * senders))
        for first in range(0, senders * count, count):
            mine = [n for n in seen if first <= n < first + count]
            assert mine == sorted(mine)

    threads = [Thread(receive, link) for link in links]
    threads += [Thread(send, link, s * count) for link in links for s in range(senders)]
    for thread in threads:
        thread.wait()


@pytest.mark.parametrize("call", ["receive", "flush"])
def test_closed_while_another_thread_waits(links, call):
    left, _ = links
    if call == "flush":
        fill(left)
    thread = Thread(getattr(left, call), True)
    thread.sleeps_in_kernel()
    left.close()
    assert left.fileno() == -1
    with pytest.raises(OSError, match=BAD):
        thread.wait()


def test_dropped_with_everything_in_it():
    """The leak guard looks at what is open afterwards."""
    sock, other = socket.socketpair()
    link = Link(other.detach())
    with sock:
        for size in (1, 2):  # complete and waiting
            sock.sendall(link_frame(1))
            socket.send_fds(sock, [link_frame(2, nfds=size)], [0] * size)
            assert link.receive(False, 1) == [(1, 0, b"", ())]
            assert link.pending
            if size == 1:
                assert fds_closed(link.receive()) == [1]
        link.send(1, 1, b"", [0, 0])
        del link
    # Half of a head, half of a payload.
    for data in (link_frame(1, nfds=2)[:3], link_frame(1, 1, b"abc", 2)[:-1]):
        sock, other = socket.socketpair()
        link = Link(other.detach())
        with sock:
            socket.send_fds(sock, [data], [0, 0])
            assert link.receive() == []
            del link


# -- signals


class Stop(Exception):
    pass


@contextlib.contextmanager
def alarms(handler: Callable[..., object]) -> Iterator[None]:
    """The handler is called again and again."""
    old = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize("call", ["receive", "flush"])
@pytest.mark.parametrize("blocking", [False, True])
def test_a_handler_runs_and_the_call_goes_on(links, call, blocking):
    left, right = links
    os.set_blocking(left.fileno(), blocking)
    count = 0

    def handler(*_: object) -> None:
        nonlocal count
        count += 1
        if count == 3 and call == "receive":
            right.send(1, 1, b"now")
            right.flush()
        if count == 3 and call == "flush":
            os.close(right.detach())

    if call == "flush":
        fill(left)
    with alarms(handler):
        if call == "receive":
            assert left.receive(True) == [(1, 1, b"now", ())]
        else:
            with pytest.raises(BrokenPipeError):
                left.flush(True)
    assert count >= 3


@pytest.mark.parametrize("call", ["receive", "flush"])
@pytest.mark.parametrize("blocking", [False, True])
def test_an_exception_of_a_handler(links, call, blocking):
    left, right = links
    os.set_blocking(left.fileno(), blocking)

    def handler(*_: object) -> None:
        raise Stop

    if call == "flush":
        fill(left)
    with alarms(handler), pytest.raises(Stop):
        getattr(left, call)(True)
    # Nothing was lost by it.
    if call == "receive":
        right.send(1, 1, b"later")
        right.flush()
        assert left.receive(True) == [(1, 1, b"later", ())]
    else:
        thread = Thread(left.flush, True)
        while left.queued:
            right.receive(True)
        thread.wait()


@pytest.mark.parametrize("call", ["receive", "flush"])
def test_closed_by_a_handler(links, call):
    left, _ = links
    if call == "flush":
        fill(left)
    with alarms(lambda *_: left.close()), pytest.raises(OSError, match=BAD):
        getattr(left, call)(True)


def test_received_by_a_handler(links):
    left, right = links
    errors = []

    def handler(*_: object) -> None:
        try:
            left.receive()
        except RuntimeError as e:
            errors.append(e)
        right.close()

    with alarms(handler):
        assert left.receive(True) == []
    assert errors


# -- closed links


def test_closed(links):
    left, _ = links
    left.send(1, 1, b"", [0])
    left.close()
    left.close()
    assert left.fileno() == -1
    assert left.queued == 0
    assert not left.pending
    for call in (
        lambda: left.send(1, 1, b""),
        left.flush,
        lambda: left.flush(True),
        left.receive,
        lambda: left.receive(True),
        left.shutdown,
        left.detach,
    ):
        with pytest.raises(OSError, match=BAD):
            call()


def test_closed_by_the_payload(links):
    """Code that runs in the middle of a call may do anything."""
    left, _ = links

    class Fds(list):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[int]:
            left.close()
            return super().__iter__()

    class Number(int):
        def __bool__(self) -> bool:
            left.close()
            return True

    class Sequence:
        def __iter__(self) -> Iterator[int]:
            left.close()
            return iter([0])

    with pytest.raises(OSError, match=BAD):
        left.send(1, 1, b"", Sequence())
    with pytest.raises(OSError, match=BAD):
        left.receive(Number(1))


def test_detach(links):
    left, right = links
    left.send(1, 1, b"", [0])
    number = left.fileno()
    fd = left.detach()
    assert fd == number
    assert left.fileno() == -1
    with socket.socket(fileno=fd) as sock:
        sock.sendall(link_frame(5))
        assert right.receive(True) == [(5, 0, b"", ())]


def test_blocking_mode_is_left_alone():
    for blocking in (False, True):
        ours, theirs = socket.socketpair()
        ours.setblocking(blocking)
        link = Link(ours.detach())
        link.send(1, 1, b"")
        link.flush()
        assert link.receive() == []
        assert os.get_blocking(link.fileno()) is blocking
        link.close()
        theirs.close()


# -- buffer_address


def test_buffer_address():
    data = bytearray(b"0123456789")
    address, size = buffer_address(data)
    assert size == 10
    assert ctypes.string_at(address, size) == data
    assert buffer_address(memoryview(data)[3:7]) == (address + 3, 4)
    assert buffer_address(memoryview(data).cast("B", (2, 5))) == (address, 10)
    assert buffer_address((ctypes.c_int * 5)())[1] == 20
    assert buffer_address(b"")[1] == 0
    with mmap.mmap(-1, 8192) as mapping:
        start, size = buffer_address(mapping)
        assert size == 8192
        assert start % mmap.PAGESIZE == 0
    with pytest.raises(BufferError):
        buffer_address(memoryview(data)[::2])
    for bad in (None, "text", 5):
        with pytest.raises(TypeError):
            buffer_address(bad)
    data.append(0)  # nothing holds on to it
