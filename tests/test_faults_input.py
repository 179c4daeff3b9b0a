"""What callers must not send, and what they may just send."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import sys

import pytest

import afork
from afork import _afork

from .conftest import read_all
from .scripts.fault_tools import log  # noqa: F401 - fixture


@pytest.fixture
def loop_factory():
    """One kind will do: what is tested here is on this side of the loop."""
    return asyncio.new_event_loop


CAP = 16 << 20

SIZES = """
def sizes(sock, *args):
    sock.sendall(repr([len(a) if isinstance(a, (str, bytes)) else 'fd' for a in args]).encode())
"""


async def sizes(f):
    return await read_all(await f.eval(SIZES).run("sizes"))


class Fileno:
    def __init__(self, value):
        self.value = value

    def fileno(self):
        return self.value


class Raises:
    def fileno(self):
        raise KeyError("own")


def closed_file():
    file = open(os.devnull)
    file.close()
    return file


def closed_socket():
    sock = socket.socket()
    sock.close()
    return sock


class OwnTLS(ssl.SSLSocket):
    pass


def tls_socket(cls=ssl.SSLSocket):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.sslsocket_class = cls
    return context.wrap_socket(
        socket.socket(), server_hostname="x", do_handshake_on_connect=False
    )


BAD_HANDLES = [
    (lambda: -1, ValueError),
    (lambda: -(1 << 40), ValueError),
    (lambda: 1 << 31, ValueError),
    (lambda: 1 << 70, ValueError),
    (lambda: 9999, OSError),
    (lambda: Fileno(9999), OSError),
    (lambda: Fileno(-1), ValueError),
    (lambda: Fileno("0"), TypeError),
    (lambda: Fileno(None), TypeError),
    (lambda: Raises(), KeyError),
    (closed_file, ValueError),
    (closed_socket, ValueError),
    (lambda: True, TypeError),
    (lambda: None, TypeError),
    (lambda: "0", TypeError),
    (lambda: b"0", TypeError),
    (lambda: 0.0, TypeError),
    (lambda: [0], TypeError),
]


@pytest.mark.parametrize("number", range(len(BAD_HANDLES)))
def test_what_is_no_handle_is_refused_at_the_call(arun, number):
    make, error = BAD_HANDLES[number]

    async def main():
        f = afork.Fork.new()
        with pytest.raises(error) as info:
            f.send_fh(make())
        if error is OSError:
            assert info.value.errno == errno.EBADF
        with pytest.raises(error):
            f.send_fh(0, 1, make(), 2)
        # All or none: only what comes now is there.
        assert await sizes(f.send_fh(0)) == b"['fd']"

    arun(main)


@pytest.mark.parametrize("cls", [ssl.SSLSocket, OwnTLS])
def test_a_tls_socket_says_what_to_send_instead(arun, cls):
    async def main():
        f = afork.Fork.new()
        with tls_socket(cls) as sock:
            with pytest.raises(TypeError, match="before the handshake"):
                f.send_fh(sock)
            with pytest.raises(TypeError, match="before the handshake"):
                f.exec("true", stdin=sock)
        assert await sizes(f) == b"[]"

    arun(main)


def test_descriptors_up_to_the_cap(arun):
    async def main():
        f = afork.Fork.new().send_fh(*[0] * 63)
        with pytest.raises(ValueError, match="64"):
            f.send_fh(0, 0)
        f.send_fh(0)
        with pytest.raises(ValueError, match="64"):
            f.send_fh(0)
        # What is pending does not keep it from forking or executing.
        children = [f.fork(), *f.fork_many(3)]
        assert all(child._process.handles == 64 for child in children)
        last = children.pop()
        assert await last.exec("true", stdin=afork.DEVNULL) is None
        for child in children:
            assert eval(await sizes(child)) == ["fd"] * 64
        assert eval(await sizes(f)) == ["fd"] * 64

    arun(main)


@pytest.mark.parametrize("bad", [5, None, 0.5, ["x"], object()])
def test_arguments_that_are_no_strings(arun, bad):
    async def main():
        f = afork.Fork.new()
        for call in (
            lambda: f.send_arg("one", bad),
            lambda: f.eval("pass", "one", bad),
            lambda: f.eval(bad),
            lambda: f.require("os", bad),
            lambda: f.run(bad),
            lambda: f.exec(bad),
            lambda: f.set(env={"NAME": bad if bad is not None else 5}),
            lambda: f.set(env={bad: "x"}),
            lambda: f.set(cwd=bad if bad is not None else 5),
        ):
            with pytest.raises(TypeError):
                call()
        assert await sizes(f.send_arg("x")) == b"[1]"

    arun(main)


def test_other_arguments_that_are_refused_at_the_call(arun):
    async def main():
        f = afork.Fork.new()
        for call in (
            lambda: f.require(""),
            lambda: f.run(""),
            lambda: f.run("nul\0inside"),
            lambda: f.set(env={"": "x"}),
            lambda: f.set(env={"A=B": "x"}),
            lambda: f.set(env={"A\0": "x"}),
            lambda: f.set(env={"A": "x\0"}),
            lambda: f.fork_many(-1),
            lambda: afork.Fork.new_exec(command=[]),
        ):
            with pytest.raises(ValueError, match=r"."):
                call()
        for call in (
            lambda: f.run(lambda sock: None),
            lambda: f.run(f.close),
            lambda: f.set(umask="7"),
            lambda: f.set(rlimits={1: ("a", "b")}),
            lambda: afork.Fork.new_exec(python="x", command=["y"]),
            lambda: afork.Fork.new_exec(command=[5]),
        ):
            with pytest.raises(TypeError):
                call()
        assert f.fork_many(0) == []
        assert await sizes(f.send_arg("x")) == b"[1]"

    arun(main)


def test_settings_that_cannot_be_made(arun):
    async def main():
        for kwargs, kind in [
            ({"cwd": "/no/such/directory"}, "FileNotFoundError"),
            ({"rlimits": {99: (1, 1)}}, "ValueError"),
            ({"rlimits": {7: (10, 5)}}, "ValueError"),
        ]:
            f = afork.Fork.new().set(**kwargs)
            with pytest.raises(afork.RemoteError) as info:
                await f.ready()
            assert (info.value.stage, info.value.type) == ("set", kind)
        assert await sizes(afork.Fork.new()) == b"[]"

    arun(main)


def test_frames_at_the_cap_arrive_and_over_it_are_refused(arun):
    async def main():
        template = afork.Fork.default()
        await template.ready()
        f = afork.Fork.new()
        just = CAP - 4  # the length itself takes four bytes
        for call in (
            lambda: f.send_arg(b"x" * (just + 1)),
            lambda: f.send_arg("x" * (just + 1)),
            lambda: f.eval("pass", b"x" * just),
            lambda: f.eval("#" * (just + 1)),
            lambda: f.require("x" * (just + 1)),
            lambda: f.run("x" * (CAP + 1)),
            lambda: f.set(env={"NAME": "x" * CAP}),
            lambda: f.set(title="x" * CAP),
        ):
            with pytest.raises(ValueError, match="cap"):
                call()
        f.send_arg(b"x" * just)
        f.send_arg("y" * just)
        assert eval(await sizes(f)) == [just, just]
        assert afork.Fork.default().pid == template.pid

    arun(main)


def test_a_function_name_at_the_cap(arun):
    async def main():
        with pytest.raises(afork.RemoteError):
            await afork.Fork.new().run("x" * CAP)
        assert await sizes(afork.Fork.new()) == b"[]"

    arun(main)


def test_lambdas_and_main_functions_are_refused_at_the_call(run_script, tmp_path):
    run_script(
        """
import afork, asyncio
def worker(sock): pass
async def main():
    f = afork.Fork.new()
    try:
        f.run(worker)  # given with -c: no process could load it
    except TypeError as exc:
        assert "-c" in str(exc)
    else:
        raise AssertionError
    f.close()
    assert await asyncio.wait_for(f.wait(), 10) == 0
asyncio.run(main())
""",
        cwd=tmp_path,
    )


@pytest.mark.parametrize(
    "what",
    [
        "garbage",
        "huge",
        "unknown",
        "two",
        "none",
        "fork",
        "exec",
        "list",
        "middle",
        "socket",
    ],
)
def test_commands_that_are_none(arun, what):
    """The template's end of hostile bytes: reported, then it ends."""
    head = lambda letter, n: bytes([letter]) + n.to_bytes(4, sys.byteorder)  # noqa: E731
    frames = {
        "garbage": b"\xff" * 100,
        "huge": head(_afork.CMD_EVAL, 0xFFFFFFFF) + b"x" * 100,
        "unknown": head(ord("?"), 0),
        "none": head(_afork.CMD_HANDLE, 0) + b"\0",
        "two": head(_afork.CMD_HANDLE, 0),
        "fork": head(_afork.CMD_FORK, 0),
        "exec": head(_afork.CMD_EXEC, 3) + b"abc",
        "list": head(_afork.CMD_ARGS, 2) + b"\x85x",
        "socket": head(_afork.CMD_FORK_ID, 8) + b"\xff" * 8,
        "middle": head(_afork.CMD_EVAL, 100) + b"x" * 10,
    }

    async def main():
        f = afork.Fork.new()
        await f.ready()
        sock = await f.to_fh()
        data = frames[what]
        if what == "two":
            sock.send(data)
            socket.send_fds(sock, [b"\0"], [0, 0])
        else:
            sock.send(data)
        sock.shutdown(socket.SHUT_WR)
        answer = await read_all(sock)
        if what == "middle":
            assert answer == b""
        else:
            assert answer[0] == _afork.REP_ERROR
            assert b"ProtocolError" in answer
        assert await f.wait() == (0 if what in ("middle",) else 1)
        assert await sizes(afork.Fork.new()) == b"[]"

    arun(main)
