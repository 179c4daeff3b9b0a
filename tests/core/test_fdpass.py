"""sendmsg and recvmsg with a descriptor: what the kernel does at the edges."""

import errno
import os
import signal
import socket

import pytest


@pytest.fixture
def pair():
    left, right = socket.socketpair()
    with left, right:
        yield left, right


@pytest.fixture
def recv(ffi, lib):
    def recv(sock, size=100):
        data = ffi.new("uint8_t[]", size)
        fd = ffi.new("int *", -99)
        n = lib.afork_fdpass_recv(sock.fileno(), data, size, fd)
        return (ffi.buffer(data, n)[:], fd[0]) if n >= 0 else n

    return recv


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def fill(sock) -> int:
    """Fill a socket to the last byte; it is back in blocking mode then."""
    n = 0
    sock.setblocking(False)
    for size in (65536, 1):
        try:
            while True:
                n += sock.send(b"x" * size)
        except BlockingIOError:
            pass
    sock.setblocking(True)
    return n


def test_round_trip(lib, pair, recv):
    left, right = pair
    with open("/dev/null") as null:
        assert lib.afork_fdpass_send(left.fileno(), b"abc", 3, null.fileno()) == 3
        data, fd = recv(right)
        assert data == b"abc"
        assert fd >= 0
        assert not os.get_inheritable(fd)
        assert os.path.sameopenfile(fd, null.fileno())
        os.close(fd)
    assert lib.afork_fdpass_send(left.fileno(), b"de", 2, lib.AFORK_NOFD) == 2
    assert recv(right, 1) == (b"d", lib.AFORK_NOFD)
    assert recv(right) == (b"e", lib.AFORK_NOFD)


def test_never_waits(lib, pair, recv):
    left, right = pair
    assert right.getblocking()
    assert recv(right) == -errno.EAGAIN
    fill(left)
    before = open_fds()
    assert lib.afork_fdpass_send(left.fileno(), b"x", 1, 0) == -errno.EAGAIN
    while isinstance(got := recv(right, 65536), tuple):
        assert got[1] == lib.AFORK_NOFD  # refused, so not sent
    assert open_fds() == before


def test_empty_send_is_refused(lib, pair, recv):
    """The kernel would take the descriptor and deliver it to nobody."""
    left, right = pair
    assert lib.afork_fdpass_send(left.fileno(), b"", 0, 0) == -errno.EINVAL
    assert lib.afork_fdpass_send(left.fileno(), b"", 0, -1) == -errno.EINVAL
    assert recv(right) == -errno.EAGAIN


def test_bad_descriptor_sends_nothing(lib, pair, recv):
    left, right = pair
    assert lib.afork_fdpass_send(left.fileno(), b"x", 1, 1 << 20) == -errno.EBADF
    assert recv(right) == -errno.EAGAIN


def test_end_of_file(lib, pair, recv):
    left, right = pair
    left.sendall(b"x")
    left.close()
    assert recv(right) == (b"x", lib.AFORK_NOFD)
    assert recv(right) == (b"", lib.AFORK_NOFD)


def test_reset(lib, pair, recv):
    left, right = pair
    right.sendall(b"never read")
    left.sendall(b"x")
    left.close()
    assert recv(right) == (b"x", lib.AFORK_NOFD)
    assert recv(right) == -errno.ECONNRESET
    assert recv(right) == (b"", lib.AFORK_NOFD)


def test_not_a_socket(lib, recv):
    with open("/dev/null", "rb") as null:
        assert recv(null) == -errno.ENOTSOCK
        number = null.fileno()
        assert lib.afork_fdpass_send(number, b"x", 1, -1) == -errno.ENOTSOCK
    assert lib.afork_fdpass_send(number, b"x", 1, -1) == -errno.EBADF


def test_no_sigpipe(script):
    script(
        """
        import errno, signal, socket
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        left, right = socket.socketpair()
        right.close()
        for fd in -1, 0:
            r = lib.afork_fdpass_send(left.fileno(), b"x", 1, fd)
            assert r == -errno.EPIPE
        """
    )


def test_sigpipe_would_kill(script):
    """The test above is worth something: a send without the flag dies."""
    script(
        """
        import signal, socket
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        left, right = socket.socketpair()
        right.close()
        left.send(b"x")
        """,
        returncode=-signal.SIGPIPE,
    )


@pytest.mark.parametrize("count", [2, 3, 253])
def test_several_on_one_byte(lib, pair, recv, count):
    left, right = pair
    before = open_fds()
    socket.send_fds(left, [b"x"], [0] * count)
    assert recv(right) == -errno.EPROTO
    assert open_fds() == before


def test_credentials_beside_it(lib, pair, recv):
    left, right = pair
    right.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    left.sendall(b"a")
    assert recv(right) == (b"a", lib.AFORK_NOFD)
    lib.afork_fdpass_send(left.fileno(), b"b", 1, 0)
    data, fd = recv(right)
    assert data == b"b"
    os.close(fd)
    before = open_fds()
    socket.send_fds(left, [b"x"], [0] * 253)
    assert recv(right) == -errno.EPROTO
    assert open_fds() == before


def test_bytes_before_and_behind(lib, pair, recv):
    """A4: bytes before a descriptor's are merged with it, bytes behind never."""
    left, right = pair
    left.sendall(b"ab")
    lib.afork_fdpass_send(left.fileno(), b"c", 1, 0)
    left.sendall(b"de")
    data, fd = recv(right)
    os.close(fd)
    assert data == b"abc"
    assert recv(right) == (b"de", lib.AFORK_NOFD)


def test_short_send_takes_the_descriptor_once(ffi, lib, pair, recv):
    left, right = pair
    big = b"x" * (4 << 20)
    n = lib.afork_fdpass_send(left.fileno(), big, len(big), 0)
    assert 0 < n < len(big)
    total, fds = 0, []
    while isinstance(got := recv(right, 65536), tuple):
        total += len(got[0])
        fds += [fd for fd in got[1:] if fd != lib.AFORK_NOFD]
    assert total == n
    assert len(fds) == 1
    os.close(fds[0])


def test_interrupted(lib, pair, recv):
    left, right = pair
    lib.shim.eintr_every = 2
    for byte in (b"a", b"b", b"c"):
        assert lib.afork_fdpass_send(left.fileno(), byte, 1, 0) == 1
        data, fd = recv(right)
        assert data == byte
        os.close(fd)


def test_no_free_slot(script):
    script(
        """
        import errno, resource, socket
        left, right = socket.socketpair()
        data, fd = ffi.new("uint8_t[9]"), ffi.new("int *")
        free = os.dup(0)
        os.close(free)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

        def recv(sent, room):
            socket.send_fds(left, [b"xy"], [0] * sent)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + room, hard))
            n = lib.afork_fdpass_recv(right.fileno(), data, 9, fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + 99, hard))
            got = fd[0]
            if n >= 0 and got >= 0:
                os.close(got)
            now = os.dup(0)
            assert now == free, "something stayed open"
            os.close(now)
            return n, got

        assert recv(1, 0) == (2, lib.AFORK_LOSTFD)
        assert recv(1, 1) == (2, free)
        for room in 1, 2, 3:
            assert recv(3, room)[0] == -errno.EPROTO
        assert recv(0, 0) == (2, lib.AFORK_NOFD)
        """
    )
