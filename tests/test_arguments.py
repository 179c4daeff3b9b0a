"""send_arg and send_fh: what arrives, and what is refused at the call."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import select
import signal
import socket
import ssl
import sys
import tempfile

import pytest

import afork

from .scripts.api_ask import ask, read_pipe

KIND = "[(type(a).__module__, type(a).__name__) for a in args]"


# -- strings


def test_strings_arrive_as_sent(arun):
    sent = (
        "text",
        b"bytes",
        "",
        b"",
        "ü€😀",
        "\udcff",
        b"\x00\xff",
        "a\0b",
        "é" * 9999,
    )

    async def main():
        assert await ask(afork.Fork.new().send_arg(*sent), "args") == sent
        one_by_one = afork.Fork.new()
        for item in sent:
            one_by_one.send_arg(item)
        assert await ask(one_by_one, "args") == sent

    arun(main)


def test_bytes_like_arrive_as_bytes(arun):
    async def main():
        f = afork.Fork.new().send_arg(bytearray(b"ab"), memoryview(b"abcd")[::2])
        assert await ask(f, "args") == (b"ab", b"ac")

    arun(main)


def test_big_and_many(arun):
    many = [str(n) for n in range(5000)]

    async def main():
        f = afork.Fork.new().send_arg(b"x" * (8 << 20), "y" * (8 << 20)).send_arg(*many)
        sizes = "(len(args[0]), len(args[1]), len(args), args[5001])"
        assert await ask(f, sizes) == (8 << 20, 8 << 20, 5002, "4999")

    arun(main)


def test_no_arguments():
    with contextlib.closing(afork.Fork.new()) as f:
        assert f.send_arg() is f
        assert f.send_fh() is f


def test_wrong_strings_are_refused_whole(arun):
    async def main():
        f = afork.Fork.new()
        for wrong in (1, None, 1.5, ["x"], object(), os):
            with pytest.raises(TypeError, match="str or bytes needed, not"):
                f.send_arg("before", wrong)
        assert await ask(f, "args") == ()

    arun(main)


def test_frame_over_the_cap_is_refused(arun):
    async def main():
        f = afork.Fork.new()
        with pytest.raises(ValueError, match="over the cap of 16777216 bytes"):
            f.send_arg(b"x" * (16 << 20))
        # just below it is fine: 4 bytes of length before the string
        f.send_arg(b"x" * ((16 << 20) - 4))
        assert await ask(f, "len(args[0])") == (16 << 20) - 4

    arun(main)


# -- descriptors


def test_kinds(arun, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")

    async def main():
        with contextlib.ExitStack() as stack:
            enter = stack.enter_context
            a, b = socket.socketpair()
            r, w = os.pipe()
            handles = [
                enter(a),
                enter(b).fileno(),
                enter(os.fdopen(r, "rb")),
                enter(os.fdopen(w, "wb")),
                enter(path.open("r+b")),
                enter(path.open()),
                enter(select.epoll()),
                enter(afork.Handle(os.open(tmp_path, os.O_RDONLY))),
                enter(afork.Handle(os.open(tmp_path, os.O_PATH))),
                enter(open("/dev/null", "rb")),
                enter(afork.Handle(os.pidfd_open(os.getpid()))),
                enter(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)),
            ]
            f = afork.Fork.new().send_fh(*handles)
        kinds = await ask(f, KIND)
        sock, file, handle = (
            ("socket", "socket"),
            ("_io", "FileIO"),
            ("afork._handles", "Handle"),
        )
        assert kinds == [
            sock,
            sock,
            file,
            file,
            file,
            file,
            handle,
            handle,
            handle,
            file,
            handle,
            sock,
        ]

    arun(main)


def test_modes_of_files(arun, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")

    async def main():
        f = afork.Fork.new()
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND):
            with afork.Handle(os.open(path, flags)) as handle:
                f.send_fh(handle)
        assert await ask(f, "[a.mode for a in args]") == ["rb", "wb", "rb+", "wb"]

    arun(main)


def test_family_type_and_blocking_state_of_sockets(arun):
    async def main():
        made = [
            socket.socket(socket.AF_INET, socket.SOCK_STREAM),
            socket.socket(socket.AF_INET6, socket.SOCK_DGRAM),
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET),
        ]
        made[1].setblocking(False)
        made[2].settimeout(5)  # non-blocking underneath
        f = afork.Fork.new().send_fh(*made)
        for sock in made:
            sock.close()
        what = "[(int(a.family), int(a.type), a.gettimeout(), os.get_blocking(a.fileno())) for a in args]"
        assert await ask(f, what) == [
            (socket.AF_INET, socket.SOCK_STREAM, None, True),
            (socket.AF_INET6, socket.SOCK_DGRAM, 0.0, False),
            (socket.AF_UNIX, socket.SOCK_SEQPACKET, 0.0, False),
        ]

    arun(main)


def test_blocking_state_is_left_alone_here():
    with socket.socket() as sock, contextlib.closing(afork.Fork.new()) as f:
        f.send_fh(sock)
        assert os.get_blocking(sock.fileno())
        assert sock.gettimeout() is None


def test_order_with_strings(arun):
    async def main():
        r, w = os.pipe()
        f = afork.Fork.new().send_arg("a").send_fh(r).send_arg(b"b", "c").send_fh(w, w)
        os.close(r)
        os.close(w)
        kinds = "[a if isinstance(a, (str, bytes)) else a.mode for a in args]"
        assert await ask(f, kinds) == ["a", "rb", b"b", "c", "wb", "wb"]

    arun(main)


def test_duplicated_when_queued(arun):
    """The number may be another file's by the time that it is sent."""

    async def main():
        r, w = os.pipe()
        # without a loop turn between these
        f = afork.Fork.new().eval("import os").send_fh(w)
        os.close(w)
        other = os.open("/dev/null", os.O_WRONLY)
        try:
            assert other == w
            f.eval("def f(sock, out): out.write(b'kept')").run("f")
            assert await read_pipe(r) == b"kept"
        finally:
            os.close(other)

    arun(main)


def test_files_are_flushed_first(arun, tmp_path):
    path = tmp_path / "log"

    async def main():
        with path.open("w") as file:
            file.write("ours ")
            f = afork.Fork.new().send_fh(file)
            assert path.read_text() == "ours "
            sent = "args[0].write(b'theirs ')"
            assert await ask(f, sent) == 7
            file.write("ours again")
        assert path.read_text() == "ours theirs ours again"

    arun(main)


def test_objects_own_their_descriptors_in_the_process(arun):
    async def main():
        r, w = os.pipe()
        f = afork.Fork.new().send_fh(r, w)
        os.close(r)
        os.close(w)
        what = "(args[1].write(b'x'), args[0].read(1), [os.get_inheritable(a.fileno()) for a in args], [a.closefd for a in args])"
        assert await ask(f, what) == (1, b"x", [False, False], [True, True])

    arun(main)


def test_handle():
    fd = os.open("/", os.O_RDONLY)
    with afork.Handle(fd) as handle:
        assert handle.fileno() == fd
        assert repr(handle) == f"<afork.Handle fd={fd}>"
        assert os.listdir(handle.fileno()) == os.listdir("/")
    with pytest.raises(ValueError, match="the handle is closed"):
        handle.fileno()
    handle.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)

    handle = afork.Handle(os.open("/", os.O_RDONLY))
    fd = handle.detach()
    del handle
    os.close(fd)  # not closed by its end

    fd = os.open("/", os.O_RDONLY)
    handle = afork.Handle(fd)
    del handle
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize(
    ("handle", "error", "match"),
    [
        (-1, ValueError, "closed handle or negative descriptor: -1"),
        (1 << 20, OSError, r"\[Errno 9\]"),
        (1 << 40, ValueError, "no descriptor has the number"),
        ("text", TypeError, "send_fh needs an int or an object with fileno"),
        (None, TypeError, "not NoneType"),
        (True, TypeError, "not a bool"),
        (1.0, TypeError, "not float"),
        (io.BytesIO(), io.UnsupportedOperation, "fileno"),
    ],
)
def test_wrong_handles_are_refused_whole(handle, error, match):
    with contextlib.closing(afork.Fork.new()) as f:
        before = os.listdir("/proc/self/fd")
        with pytest.raises(error, match=match):
            f.send_fh(0, handle)
        assert os.listdir("/proc/self/fd") == before


def test_closed_handles_are_refused():
    with contextlib.closing(afork.Fork.new()) as f:
        sock = socket.socket()
        sock.close()
        with pytest.raises(
            ValueError, match="closed handle or negative descriptor: -1"
        ):
            f.send_fh(sock)
        file = tempfile.TemporaryFile()
        file.close()
        with pytest.raises(ValueError, match="closed file"):
            f.send_fh(file)


def test_fileno_that_is_no_int():
    class Odd:
        def fileno(self):
            return "3"

    with (
        contextlib.closing(afork.Fork.new()) as f,
        pytest.raises(TypeError, match=r"fileno\(\) returned str, not int"),
    ):
        f.send_fh(Odd())


def test_tls_socket_is_refused_with_advice():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    a, b = socket.socketpair()
    with (
        a,
        b,
        context.wrap_socket(
            a, do_handshake_on_connect=False, server_hostname="x"
        ) as tls,
        contextlib.closing(afork.Fork.new()) as f,
        pytest.raises(TypeError, match="Send the plain socket before the handshake"),
    ):
        f.send_fh(tls)


def test_cap_of_64_pending(arun):
    async def main():
        f = afork.Fork.new()
        f.send_fh(*[0] * 60)
        with pytest.raises(ValueError, match="more than 64 descriptors pending"):
            f.send_fh(*[0] * 5)
        f.send_fh(*[0] * 4)
        with pytest.raises(ValueError, match="more than 64 descriptors pending"):
            f.send_fh(0)
        # a full process can still be forked, and its copies have all of them
        g, *more = f.fork(), *f.fork_many(3)
        with pytest.raises(ValueError, match="more than 64 descriptors pending"):
            g.send_fh(0)
        for each in (g, *more, f):
            assert await ask(each, "len(args)") == 64

    arun(main)


def test_nothing_stays_open_in_the_template(arun):
    async def main():
        template = afork.Fork.new_exec()
        await template.ready()
        before = sorted(os.listdir(f"/proc/{template.pid}/fd"))
        for _ in range(3):
            r, w = os.pipe()
            f = template.fork().send_fh(r, w)
            os.close(r)
            os.close(w)
            assert await ask(f, "len(args)") == 2
        f = template.fork()
        await f.exec("true", fds={5: 0})
        await f.wait()
        await template.ready()
        assert sorted(os.listdir(f"/proc/{template.pid}/fd")) == before

    arun(main)


def test_listening_socket_is_shared_by_workers(arun):
    async def main():
        with socket.create_server(("127.0.0.1", 0)) as server:
            template = (
                afork.Fork.new()
                .send_fh(server)
                .eval(
                    """
                def serve(sock, server):
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(b"served")
                """
                )
            )
            workers = template.fork_many(3)
            for f in workers:
                (await f.run("serve")).close()
            for _ in workers:
                with socket.create_connection(server.getsockname(), 10) as c:
                    assert c.recv(99) == b"served"
            template.close()
            for f in workers:
                assert await f.wait() == 0

    arun(main)


def test_reports_of_lost_descriptors(arun):
    """A process at its limit cannot receive: its owner is told, by run."""
    import resource

    async def main():
        f = afork.Fork.new()
        limit = len(os.listdir("/proc/self/fd"))
        f.set(rlimits={resource.RLIMIT_NOFILE: (4, 4)})
        f.send_fh(0, 1)
        with pytest.raises(OSError, match="a descriptor was lost") as info:
            await f.run("os.getpid")
        assert info.value.errno == 24
        assert len(os.listdir("/proc/self/fd")) <= limit + 1

    arun(main)


def test_passes_credentials_of_nothing_else(arun):
    """What is open here does not travel by accident."""

    async def main():
        r, w = os.pipe()
        os.set_inheritable(r, True)
        os.set_inheritable(w, True)
        f = afork.Fork.new_exec()
        fds = await ask(f, "sorted(int(n) for n in os.listdir('/proc/self/fd'))")
        os.close(w)
        assert await read_pipe(r) == b""
        # stdio, the socket, and the directory that listdir reads
        assert len(fds) == 5

    arun(main)


def test_flags_are_shared_with_us_as_dup_does(arun):
    async def main():
        a, b = socket.socketpair()
        with a, b:
            f = afork.Fork.new().send_fh(a)
            assert await ask(f, "args[0].setblocking(False)") is None
            assert fcntl.fcntl(a, fcntl.F_GETFL) & os.O_NONBLOCK

    arun(main)


def test_stdio_numbers_are_accepted(arun):
    async def main():
        f = afork.Fork.new().send_fh(sys.__stdin__.fileno())
        assert await ask(f, "len(args)") == 1

    arun(main)


def test_signal_numbers_are_no_handles():
    with (
        contextlib.closing(afork.Fork.new()) as f,
        # an IntEnum is an int: what counts is whether it is open
        pytest.raises(OSError, match="Bad file descriptor"),
    ):
        f.send_fh(signal.SIGRTMAX)
