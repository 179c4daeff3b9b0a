"""Both ways with the original: unmodified AnyEvent::Fork, from Debian's package.

The protocol is its protocol, byte for byte: that is what makes this possible,
and what this proves.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import hashlib
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import afork

from .conftest import HANG, SCRIPTS, read_all
from .scripts.api_ask import read_pipe

#: Installed beside the interpreter.
SERVER = Path(sys.executable).with_name("afork-serve")

SERVE = ("-MAnyEvent::Fork::Serve", "-e", "AnyEvent::Fork::Serve::me")


# -- AnyEvent::Fork drives our server


@pytest.fixture
def client(perl):
    """Run a scenario of interop_client.pl; what it has printed, and complained."""

    def run(scenario: str, fd: int | None = None) -> tuple[str, str]:
        done = subprocess.run(
            [
                perl,
                SCRIPTS / "interop_client.pl",
                SERVER,
                scenario,
                *([] if fd is None else [str(fd)]),
            ],
            pass_fds=[] if fd is None else [fd],
            capture_output=True,
            encoding="latin-1",
            timeout=3 * HANG,
        )
        assert done.returncode == 0, done
        return done.stdout, done.stderr

    return run


async def hand_over(f: afork.Fork) -> socket.socket:
    return await f.to_fh(plain=True)


@pytest.fixture(params=["executes", "is given"])
def drive(request, client, capfd):
    """Run a scenario: Perl executes our server, or is given a process of ours."""

    def run(scenario: str) -> tuple[str, str]:
        if request.param == "executes":
            return client(scenario)
        f = afork.Fork.new()
        with asyncio.run(hand_over(f)) as sock:
            out, err = client(scenario, sock.fileno())
        assert err == ""
        # A process complains where its template does, and that is ours.
        return out, capfd.readouterr().err

    return run


def test_perl_evaluates_python_with_bytes(drive):
    assert drive("eval") == (
        r"(((b'aaa', b'', b'\xff\x00'), 'tuple'), '__main__')" "\nTrue\n",
        "",
    )


def test_perl_sends_strings_and_handles_in_order(drive):
    kinds = ["bytes", "bytes", "FileIO", "bytes", "bytes"]
    strings = [b"s1", b"", b"x" * 130, b"\xff\0"]
    assert drive("arguments") == (
        f"{(kinds, (None, strings))}\nthrough the pipe\n",
        "",
    )


def test_perl_forks_forks(drive):
    assert drive("fork") == (
        "(b'all', b'later', b'three', b'four')\n"
        "(b'all', b'one')\n"
        "(b'all', b'later', b'three')\n"
        "(b'all', b'later')\n"
        "(b'all', b'later')\n",
        "",
    )


def test_perl_requires_python_modules(drive):
    out, err = drive("require")
    assert out == "([1], 'b')\nafter it: \n"
    assert err.count("Traceback") == 1
    assert "TypeError: " in err


def test_perl_talks_to_a_function_at_once(drive):
    assert drive("echo") == ("6000 HELLO\n", "")


def test_perl_sees_the_end_of_what_failed(drive):
    out, err = drive("errors")
    assert out == (
        "1 / 0: eof\n"
        "def def: eof\n"
        "import no_such_module: eof\n"
        "run nothing: \n"
        "run json::nothing: \n"
        "run : \n"
        "fork after an error: eof eof\n"
        "the next: ()\n"
    )
    # Standard error is the only place for what was wrong, and has all of it.
    assert err.count("\nZeroDivisionError: division by zero\n") == 2
    assert err.count("\nSyntaxError: ") == 1
    assert err.count("\nModuleNotFoundError: No module named 'no_such_module'\n") == 1
    assert err.count("AttributeError: ") == 3


def test_perl_learns_exit_statuses_of_its_children(client):
    out, err = client("statuses")
    assert out == "eof: 0\nexit: 3\nerror: 1\nfunction: 5\n"
    assert err.count("Traceback") == 1


def test_perl_sends_5_mb(drive):
    assert drive("big") == ("same 5000000\n", "")


def test_perl_forks_50(drive):
    assert drive("fan_out") == ("50 1\n", "")


def test_perl_takes_over_a_process_of_ours(arun, client):
    async def main():
        f = afork.Fork.new().send_arg("python").eval("taken = 1")
        sock = await f.to_fh(plain=True)
        try:
            out, err = await asyncio.to_thread(client, "taken", sock.fileno())
        finally:
            sock.close()
        # Bytes from the client, text from us: each as it was sent.
        assert out == "('python', b'perl', b'child')\n('python', b'perl')\n"
        assert err == ""
        # Who made it still knows how it ended.
        assert await f.wait() == 0

    arun(main)


def test_perl_drives_a_server_at_the_end_of_a_socket(client):
    ours, theirs = socket.socketpair()
    with (
        ours,
        subprocess.Popen(
            [SERVER, str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
        ) as process,
    ):
        theirs.close()
        out, err = client("taken", ours.fileno())
        ours.close()
        assert process.wait(HANG) == 0
    assert (out, err) == ("(b'perl', b'child')\n(b'perl',)\n", "")


def test_perl_hands_a_process_to_us(arun, perl):
    async def main():
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            process = await asyncio.create_subprocess_exec(
                perl,
                SCRIPTS / "interop_client.pl",
                SERVER,
                "to_fh",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdout=subprocess.PIPE,
            )
            theirs.close()
            assert await process.stdout.readline() == b"sent\n"
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
            f = afork.Fork.new_from_fh(socket.socket(fileno=fds[0]), plain=True)
            child = f.fork().send_arg("child")
            f.send_arg("python")
            assert await read_all(await child.run("show")) == b"(b'perl', b'child')"
            assert await read_all(await f.run("show")) == b"(b'perl', b'python')"
            ours.close()
            # Its template has its output as well: both have ended at the end.
            assert await process.stdout.read() == b""
            assert await process.wait() == 0

    arun(main)


def test_server_started_by_hand_says_what_it_is_for():
    for args in ([], ["no", "number"], ["--help"]):
        done = subprocess.run([SERVER, *args], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.startswith("usage: afork-serve [ignored ...] FD OWNER\n")


# -- we drive Perl's server


@pytest.fixture
def server(perl):
    """A new process of AnyEvent::Fork::Serve, found by PATH or path."""

    def new(command: str = perl) -> afork.Fork:
        return afork.Fork.new_exec(command=[command, *SERVE])

    return new


SHOW = r"""
sub show {
    my ($sock, @args) = @_;
    syswrite $sock, join "|", map { ref $_ ? "handle" : $_ } @args;
}
"""


def test_we_evaluate_perl_with_arguments(arun, server):
    async def main():
        f = (
            server("perl")
            .eval("$::kept = join '-', @_", "a" * 3, b"", b"\xff\0", "ü")
            .eval("sub tell { syswrite $_[0], $::kept }")
            .eval("")
        )
        assert await f.ready() is f
        text = b"aaa--\xff\0-" + "ü".encode()
        assert await read_all(await f.run("tell")) == text
        assert await f.wait() == 0

    arun(main)


def test_we_send_strings_and_handles_in_order(arun, server):
    async def main():
        reading, writing = os.pipe()
        f = server().eval(
            SHOW + "sub first { syswrite $_[2], 'through'; close $_[2]; &show }"
        )
        f.send_arg("s1").send_fh(writing).send_arg(b"", b"\xff", "x" * 130)
        os.close(writing)
        sock = await f.run("first")
        assert await read_pipe(reading) == b"through"
        assert await read_all(sock) == b"s1|handle||\xff|" + b"x" * 130
        assert await f.wait() == 0

    arun(main)


def test_we_fork_forks(arun, server):
    async def main():
        f = server().eval(SHOW).send_arg("all")
        one = f.fork().send_arg("one")
        f.send_arg("later")
        two = f.fork().eval("$::generation = 2")
        three, four = two.fork_many(2)
        three.send_arg("three")
        five = three.fork().eval("die unless $::generation == 2").send_arg("five")
        for process, text in (
            (five, b"all|later|three|five"),
            (one, b"all|one"),
            (three, b"all|later|three"),
            (four, b"all|later"),
            (two, b"all|later"),
        ):
            assert await read_all(await process.run("show")) == text
        # It has forked, and is run itself: plain is the original's protocol.
        assert await read_all(await f.run("show")) == b"all|later"
        assert await f.wait() == 0

    arun(main)


def test_we_require_perl_modules(arun, server):
    async def main():
        f = (
            server()
            .require("Text::Wrap", "Digest::SHA")
            .eval("sub tell { syswrite $_[0], Digest::SHA::sha256_hex('') }")
        )
        assert await read_all(await f.run("tell")) == (
            hashlib.sha256(b"").hexdigest().encode()
        )
        assert await f.wait() == 0

    arun(main)


def test_we_talk_to_a_perl_function(arun, server):
    async def main():
        f = server().eval(
            "sub echo { my ($s) = @_; syswrite $s, uc while defined ($_ = <$s>); exit 3 }"
        )
        sock = await f.run("echo")
        assert sock.gettimeout() == 0
        await asyncio.get_running_loop().sock_sendall(sock, b"hello\nworld\n")
        sock.shutdown(socket.SHUT_WR)
        assert await read_all(sock) == b"HELLO\nWORLD\n"
        assert await f.wait() == 3

    arun(main)


@pytest.mark.parametrize(
    ("code", "function", "status", "complaint"),
    [
        ("die 'oops'", "", 0, "ERROR: oops at "),
        ("not perl at all", "", 0, "ERROR: "),
        ("require No::Such::Module", "", 0, "ERROR: Can't locate No/Such/Module.pm"),
        ("exit 4", "", 4, ""),
        ("", "nothing", 255, "ndefined subroutine &main::nothing"),
        ("sub f { die 'late' }", "f", 255, "late at "),
    ],
)
def test_we_learn_how_a_perl_process_failed(
    arun, server, capfd, code, function, status, complaint
):
    """By its exit status; the protocol has no place for more."""

    async def main():
        f = server()
        if code:
            f.eval(code)
        if function:
            # Entered or not: run is over once it has been sent.
            assert await read_all(await f.run(function)) == b""
        assert await f.wait() == status

    arun(main)
    out, err = capfd.readouterr()
    assert out == ""
    if complaint:
        assert complaint in err
    else:
        assert err == ""


def test_we_notice_a_perl_process_that_has_ended(arun, server):
    async def main():
        f = server().eval("exit 4")
        assert await f.wait() == 4
        with pytest.raises(afork.TemplateError) as info:
            await f.eval("1").run("show")
        assert (info.value.pid, info.value.status) == (f.pid, 4 << 8)

    arun(main)


def test_what_the_original_cannot_do_is_refused(arun, server):
    async def main():
        f = server()
        with pytest.raises(afork.AforkError, match="set needs a process in afork mode"):
            f.set(umask=0)
        with pytest.raises(afork.AforkError, match="exec needs a process in afork"):
            f.exec("true")
        f.close()
        assert await f.wait() == 0

    arun(main)


def test_command_that_does_not_exist():
    fds = set(os.listdir("/proc/self/fd"))
    for command in ("afork-no-such-program", "/no/such/program"):
        with pytest.raises(FileNotFoundError) as info:
            afork.Fork.new_exec(command=[command])
        assert info.value.filename == command
    assert set(os.listdir("/proc/self/fd")) == fds


def test_we_hand_a_perl_process_on(arun, server):
    """Through our own hands, and into those of a Python process."""

    async def main():
        f = server().eval(SHOW).send_arg("first")
        again = afork.Fork.new_from_fh(await f.to_fh(), plain=True).send_arg("second")
        worker = afork.Fork.new().eval(
            """
            import afork

            async def drive(sock, theirs):
                f = afork.Fork.new_from_fh(theirs, plain=True).send_arg("third")
                answer = await f.run("show")
                answer.setblocking(True)
                sock.sendall(answer.recv(99))
                answer.close()
            """
        )
        sock = await again.to_fh()
        worker.send_fh(sock)
        sock.close()
        assert await read_all(await worker.run("drive")) == b"first|second|third"
        assert await f.wait() == 0
        assert await worker.wait() == 0

    arun(main)


def test_we_send_5_mb_to_perl(arun, server):
    async def main():
        text = bytes(range(256)) * 19532
        assert len(text) > 5_000_000
        f = server().require("Digest::SHA").eval("$::first = $_[0]", text)
        f.send_arg(text).eval(
            "sub tell { my $s = shift;"
            " syswrite $s, join ' ', map Digest::SHA::sha256_hex($_), $::first, @_ }"
        )
        digest = hashlib.sha256(text).hexdigest()
        assert await read_all(await f.run("tell")) == f"{digest} {digest}".encode()
        assert await f.wait() == 0

    arun(main)


def test_we_fork_50_perls(arun, server):
    async def main():
        f = server().eval(SHOW).send_arg("all")
        children = [f.fork().send_arg(str(n)) for n in range(50)]
        socks = await asyncio.gather(*(child.run("show") for child in children))
        answers = await asyncio.gather(*map(read_all, socks))
        assert answers == [b"all|%d" % n for n in range(50)]
        f.close()
        assert await f.wait() == 0

    arun(main)


# -- the bytes


def captured_frame(letter: bytes, payload: bytes) -> bytes:
    return letter + struct.pack("=I", len(payload)) + payload


def receive_all(sock: socket.socket) -> list[tuple[bytes, int | None]]:
    """What is in a socket: runs of bytes, and what single bytes have carried."""
    items: list[tuple[bytes, int | None]] = []
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            data, ancillary, flags, _ = sock.recvmsg(1, socket.CMSG_SPACE(64))
            if not data:
                break
            assert not flags & socket.MSG_CTRUNC
            if ancillary:
                ((level, kind, payload),) = ancillary
                assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
                (fd,) = array.array("i", payload)
                items.append((data, fd))
            elif items and items[-1][1] is None:
                items[-1] = (items[-1][0] + data, None)
            else:
                items.append((data, None))
    return items


def test_plain_mode_sends_the_bytes_of_the_original():
    """The session captured from the original, value for value.

    What it writes frame by frame may be merged here; the byte that carries a
    descriptor is a NUL of its own behind its frame all the same.
    """
    code = "sub worker {" + "#" * 114 + "}"
    assert len(code) == 127
    reading, writing = os.pipe()
    ours, t_server = socket.socketpair()
    with t_server:
        t = afork.Fork.new_from_fh(ours, plain=True)
        p = t.fork()
        p.require("Text::Wrap").send_arg("s1", "").send_fh(writing)
        p.send_arg("x" * 130).eval(code)
        os.close(writing)
        k = p.fork()
        k.send_arg("last")
        k.run("worker")

        (head, none), (nul, p_fd), (tail, none2) = receive_all(t_server)
        assert (none, none2) == (None, None)
        assert (head, nul, tail) == (b"h\0\0\0\0", b"\0", b"f\0\0\0\0")

        with socket.socket(fileno=p_fd) as p_server:
            items = receive_all(p_server)
            assert [data for data, _ in items] == [
                bytes.fromhex(
                    "65 21 00 00 00  16 72 65 71 75 69 72 65 20 22 24 5f 2e 70"
                    "6d 22 20 66 6f 72 20 40 5f  09 54 65 78 74 2f 57 72 61 70"
                    "61 04 00 00 00  02 73 31  00"
                    "68 00 00 00 00"
                ),
                b"\0",
                bytes.fromhex("61 84 00 00 00  81 02" + "78" * 130)
                + bytes.fromhex("65 80 00 00 00  7f")
                + code.encode()
                + bytes.fromhex("68 00 00 00 00"),
                b"\0",
                bytes.fromhex("66 00 00 00 00"),
            ]
            pipe, k_fd = items[1][1], items[3][1]
            assert os.path.sameopenfile(pipe, reading)  # one pipe, either end
            os.close(pipe)
            with socket.socket(fileno=k_fd) as k_server:
                # The server's end is to be blocking, whatever ours is.
                assert os.get_blocking(k_fd)
                ((data, none),) = receive_all(k_server)
                assert none is None
                assert data == bytes.fromhex(
                    "61 05 00 00 00  04 6c 61 73 74"
                ) + bytes.fromhex("72 06 00 00 00  77 6f 72 6b 65 72")
    os.close(reading)
    p.close()
    t.close()


@pytest.mark.parametrize(
    "strings", [(), ("",), ("", "a" * 127, "b" * 128, "c" * 16384)]
)
def test_plain_arguments_are_string_lists(strings):
    ours, server = socket.socketpair()
    with server:
        f = afork.Fork.new_from_fh(ours, plain=True).send_arg(*strings)
        lengths = {0: b"\0", 127: b"\x7f", 128: b"\x81\0", 16384: b"\x81\x80\0"}
        payload = b"".join(lengths[len(s)] + s.encode() for s in strings)
        expected = captured_frame(b"a", payload) if strings else b""
        f.close()
        data = b"".join(data for data, _ in receive_all(server))
        assert data == expected
