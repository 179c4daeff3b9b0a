"""A server that speaks the original's protocol."""

import socket
import struct

import pytest

from .reference import frame


def test_plain_mode_is_silent(serve):
    server = serve("p")
    server.eval(b"ok")
    server.send_list("ARGS", b"x")
    with server.fork() as child:
        child.run(b"dump")
        lines = child.rest().decode().splitlines()
        assert "bytes x" in lines  # its first byte: nothing came before it
    status, reports, log = server.end()
    assert (status, reports) == (0, [])
    assert log == ["e 3 ok", "find dump", "left 1", "left 0"]


@pytest.mark.parametrize("letter", sorted(set("EtmsFyxX") | {"\0", "\xff", "z"}))
def test_plain_mode_knows_five_letters(serve, letter):
    server = serve("p")
    data = frame(letter.encode("latin-1"), struct.pack("=Q", 1))
    socket.send_fds(server.sock, [data], [0] * (letter == "F"))
    assert server.rest() == b""
    assert server.process.wait(20) == 100


def test_plain_mode_ends_at_its_first_error(serve):
    server = serve("p")
    server.eval(b"fail")
    assert server.rest() == b""
    assert server.process.wait(20) == 100


def test_plain_mode_failed_fork_closes_the_socket(serve):
    server = serve("p")
    server.eval(b"forkfail")
    with server.fork() as child:
        assert child.rest() == b""
    with server.fork() as child:
        child.run(b"exit:0")
        assert child.rest() == b""


def test_plain_children_live_on(serve):
    """No death signal: the original's workers are on their own."""
    server = serve("p")
    with server.fork() as child:
        child.run(b"dump")
        assert child.rest()
    with server.fork() as child:
        child.run(b"hold")
        server.sock.close()
        assert server.process.wait(20) == 0
        child.sock.shutdown(socket.SHUT_WR)
        assert child.rest() == b""
