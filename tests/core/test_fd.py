"""Descriptors: numbers, flags, closing; and the title of a process."""

import errno
import os
import socket

import pytest


def test_close(ffi, lib):
    slot = ffi.new("int *", os.dup(0))
    number = slot[0]
    lib.afork_fd_close(slot)
    assert slot[0] == lib.AFORK_NOFD
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    lib.afork_fd_close(slot)
    slot[0] = lib.AFORK_LOSTFD
    lib.afork_fd_close(slot)
    assert slot[0] == lib.AFORK_NOFD


def test_dup(lib):
    fd = lib.afork_fd_dup(0)
    assert fd >= 3
    assert not os.get_inheritable(fd)
    os.close(fd)
    assert lib.afork_fd_dup(fd) == -errno.EBADF


def test_nonblock(lib):
    with socket.socket(socket.AF_UNIX) as sock:
        for on in (1, 1, 0, 0):
            assert lib.afork_fd_nonblock(sock.fileno(), on) == 0
            assert os.get_blocking(sock.fileno()) == (not on)
    assert lib.afork_fd_nonblock(-1, 1) == -errno.EBADF


@pytest.mark.parametrize("closed", [(), (0,), (2,), (0, 1), (0, 1, 2)])
def test_pair_is_never_stdio(script, closed, tmp_path):
    """A socket in the place of a closed stdin would be mistaken for it."""
    script(
        f"""
        out = os.open({str(tmp_path / "out")!r}, os.O_CREAT | os.O_WRONLY)
        for fd in {closed!r}:
            os.close(fd)
        pair = ffi.new("int[2]")
        assert lib.afork_fd_pair(pair) == 0
        assert min(pair) >= 3 and pair[0] != pair[1]
        assert not any(os.get_inheritable(fd) for fd in pair)
        os.write(pair[0], b"hello")
        assert os.read(pair[1], 9) == b"hello"
        os.close(pair[0])
        os.close(pair[1])
        free = [fd for fd in range(pair[1] + 1) if not os.path.exists(f"/proc/self/fd/{{fd}}")]
        assert free[: len({closed!r})] == list({closed!r}), free
        os.write(out, b"done")
        """
    )
    assert (tmp_path / "out").read_text() == "done"


def test_pair_at_the_limit(script):
    script(
        """
        import errno, resource
        pair = ffi.new("int[2]", (-7, -7))
        busy = os.dup(2)  # a limit of 3 would be another error, EINVAL
        free = os.dup(2)
        os.close(free)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        for spare in 0, 1:
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + spare, hard))
            assert lib.afork_fd_pair(pair) == -errno.EMFILE
        assert list(pair) == [-7, -7]
        os.close(0)
        os.close(1)
        # Room for the pair, but only where stdio belongs.
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        assert lib.afork_fd_pair(pair) == -errno.EMFILE
        assert os.open("/", os.O_RDONLY) == 0 and os.open("/", os.O_RDONLY) == 1
        """
    )


@pytest.mark.parametrize("old_kernel", [0, 1])
def test_cloexec_from(script, old_kernel):
    script(
        f"""
        import fcntl, resource
        lib.shim.no_close_range = {old_kernel}
        fds = [os.open("/", os.O_RDONLY) for _ in range(5)]
        far = fcntl.fcntl(0, fcntl.F_DUPFD, 200)
        for fd in *fds, far, 0, 1, 2:
            os.set_inheritable(fd, True)
        assert lib.afork_fd_cloexec_from(fds[1]) == 0
        assert [os.get_inheritable(fd) for fd in fds] == [True] + [False] * 4
        assert not os.get_inheritable(far)
        assert all(os.get_inheritable(fd) for fd in range(3))
        """
    )


def test_title(script):
    script(
        """
        def shown():
            return open("/proc/self/cmdline", "rb").read()

        size = len(shown())
        for title in b"afork: template", b"", b"x" * 10000, b"afork: worker \\0 y":
            assert lib.afork_proctitle_set(title, len(title)) == 0
            cmdline = shown()
            assert cmdline.rstrip(b"\\0") == title[: size - 1].rstrip(b"\\0")
            comm = open("/proc/self/comm", "rb").read()
            short = title.split(b"\\0")[0].replace(b" ", b"")[:15]
            assert comm == short + b"\\n"
        assert os.environb  # what lies behind the title is untouched
        env = open("/proc/self/environ", "rb").read()
        assert b"AFORK_LAST=mark" in env.split(b"\\0")
        """,
        env={**os.environ, "AFORK_LAST": "mark"},
    )
