"""to_fh and new_from_fh: process objects that change hands."""

from __future__ import annotations

import os
import socket

import pytest

import afork

from .scripts.api_ask import ask, read_all


def test_within_one_process(arun):
    async def main():
        f = afork.Fork.new().eval("x = 1").send_arg("a")
        with await f.to_fh() as sock:
            assert type(sock) is socket.socket
            assert sock.gettimeout() == 0
            with pytest.raises(afork.ClosedError, match="eval after to_fh"):
                f.eval("1")
            with pytest.raises(afork.ClosedError, match="to_fh after to_fh"):
                await f.to_fh()
            g = afork.Fork.new_from_fh(sock)
        g.eval("x += 1").send_arg("b")
        assert await ask(g, "(x, args)") == (2, ("a", "b"))

    arun(main)


def test_pid_and_end_are_known_to_the_new_owner(arun):
    async def main():
        f = await afork.Fork.new().ready()
        g = afork.Fork.new_from_fh(await f.to_fh())
        await g.ready()
        assert g.pid == f.pid
        child = g.fork()
        assert await ask(child, "os.getppid()") == f.pid
        assert await child.wait() == 0
        g.close()
        # the old owner's template still reports it
        assert await f.wait() == 0

    arun(main)


def test_errors_reach_the_new_owner(arun):
    async def main():
        g = afork.Fork.new_from_fh(await afork.Fork.new().to_fh())
        with pytest.raises(afork.RemoteError, match="ZeroDivisionError"):
            await g.eval("1 / 0").run("os.getpid")

    arun(main)


def test_to_another_process(arun):
    """A worker of one process configures and runs another."""

    async def main():
        f = (
            afork.Fork.new()
            .eval("x = 'prepared'")
            .eval("def f(sock): sock.sendall(x.encode())")
        )
        given = await f.to_fh()
        taker = afork.Fork.new().send_fh(given)
        given.close()
        taker.eval(
            """
            async def take(sock, handle):
                import afork, asyncio
                g = afork.Fork.new_from_fh(handle)
                theirs = await g.eval("x += ' and taken'").run("f")
                loop = asyncio.get_running_loop()
                while data := await loop.sock_recv(theirs, 99):
                    sock.sendall(data)
                theirs.close()
            """
        )
        assert await read_all(await taker.run("take")) == b"prepared and taken"

    arun(main)


def test_a_template_given_away_serves_its_new_owner(arun):
    async def main():
        template = afork.Fork.new_exec().eval("x = 1")
        g = afork.Fork.new_from_fh(await template.to_fh())
        for n in range(3):
            assert await ask(g.fork().eval(f"x += {n}"), "x") == 1 + n
        g.close()
        assert await template.wait() == 0

    arun(main)


def test_plain_turns_reports_off(arun):
    async def main():
        f = afork.Fork.new().eval("x = 1")
        sock = await f.to_fh(plain=True)
        g = afork.Fork.new_from_fh(sock, plain=True)
        g.eval("x += 1").send_arg("text")
        g.eval("def show(sock, *args): sock.sendall(repr((x, args)).encode())")
        ours = await g.run("show")
        # no report comes before the function's own bytes; strings are bytes
        assert await read_all(ours) == b"(2, (b'text',))"
        assert await f.wait() == 0

    arun(main)


def test_plain_refuses_what_the_protocol_has_not(arun):
    async def main():
        sock = await afork.Fork.new().to_fh(plain=True)
        g = afork.Fork.new_from_fh(sock, plain=True)
        with pytest.raises(afork.AforkError, match="set needs a process in afork mode"):
            g.set(umask=0)
        with pytest.raises(
            afork.AforkError, match="exec needs a process in afork mode"
        ):
            g.exec("true")
        await g.ready()
        # forks of it are plain, too
        child = g.fork()
        with pytest.raises(afork.AforkError, match="this one is plain"):
            child.set(umask=0)
        sock = await child.eval("def f(sock): sock.sendall(b'x')").run("f")
        assert await read_all(sock) == b"x"
        g.close()

    arun(main)


def test_pending_arguments_go_along(arun):
    async def main():
        r, w = os.pipe()
        f = afork.Fork.new().send_fh(w).send_arg("x")
        os.close(w)
        g = afork.Fork.new_from_fh(await f.to_fh())
        assert await ask(g, "(args[0].write(b'out'), args[1])") == (3, "x")
        with open(r, "rb") as file:
            assert file.read() == b"out"

    arun(main)


def test_of_a_failed_process(arun):
    async def main():
        f = afork.Fork.new().eval("1 / 0")
        with pytest.raises(afork.RemoteError, match="ZeroDivisionError"):
            await f.to_fh(plain=True)

    arun(main)


def test_of_a_dead_process(arun):
    async def main():
        f = await afork.Fork.new().ready()
        f.kill()
        assert await f.wait() == -9
        with pytest.raises(afork.WorkerLost, match="killed by SIGKILL"):
            await f.to_fh()

    arun(main)


def test_peer_that_is_gone(arun):
    async def main():
        a, b = socket.socketpair()
        b.close()
        f = afork.Fork.new_from_fh(a)
        with pytest.raises(afork.WorkerLost):
            await f.ready()

    arun(main)


def test_wrong_sockets_are_refused():
    with pytest.raises(TypeError, match="a socket is needed, not int"):
        afork.Fork.new_from_fh(3)
    with (
        socket.socket() as sock,
        pytest.raises(ValueError, match="an open unix stream socket"),
    ):
        afork.Fork.new_from_fh(sock)
    a, b = socket.socketpair()
    a.close()
    b.close()
    with pytest.raises(ValueError, match="an open unix stream socket is needed"):
        afork.Fork.new_from_fh(a)
