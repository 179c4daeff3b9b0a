"""Peers of a server that send garbage, are slow, or read no more."""

import contextlib
import errno
import os
import socket
import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from .reference import FRAME_MAX, Peer, exec_payload, frame, put_list
from .server import Server, done_token, names

bounded = settings(max_examples=100, deadline=None, database=None, print_blob=True)


HOSTILE = {
    "unknown letter": frame(b"Z"),
    "letter zero": frame(b"\0"),
    "4 GiB": struct.pack("=BI", ord("e"), 2**32 - 1),
    "over the cap": struct.pack("=BI", ord("a"), FRAME_MAX + 1),
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "handle with text": frame(b"h") + b"x",
    "handle without": frame(b"h") + b"\0",
    "list too short": frame(b"a", b"\x05abc"),
    "list not minimal": frame(b"a", b"\x80\x01x"),
    "list over 32 bits": frame(b"t", b"\xff\xff\xff\xff\x7f"),
    "list cut in a number": frame(b"t", b"\x01x\x81"),
    "fork of nothing": frame(b"f"),
    "fork of a string": frame(b"a", b"\x01x") + frame(b"f"),
    "fork by id without a socket": frame(b"F", b"12345678"),
    "ready": frame(b"y", b"1"),
    "exec nothing": frame(b"x"),
    "exec garbage": frame(b"x", b"\x1c" + b"\xff" * 28),
    "exec without handles": frame(b"x", exec_payload([b"x"], handles=1)),
    "spawn short": frame(b"X", b"1234567"),
    "spawn garbage": frame(b"X", b"12345678\x01"),
    "spawn extra": frame(b"X", b"12345678" + exec_payload([b"x"]) + b"\0"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(serve, name):
    """One error report, and the process ends; nothing of it was executed."""
    server = serve()
    with contextlib.suppress(BrokenPipeError):
        server.sock.sendall(HOSTILE[name] + frame(b"e", put_list([b"ok"])))
    _, error = server.expect("STARTED", "ERROR")
    stage, number, kind, message, *_ = error[1:]
    assert (stage, kind) == ("protocol", "ProtocolError")
    assert number == (errno.EMSGSIZE if "over the cap" in message else errno.EPROTO)
    assert server.rest() == b""
    assert server.process.wait(20) == 100
    (line,) = server.log()
    assert line.startswith("left -")


@pytest.mark.parametrize("payload", [b"", b"1234567", b"123456789"])
@pytest.mark.parametrize("flags", ["", "p"])
def test_malformed_fork(serve, flags, payload):
    """Its socket is closed: the owner is not left waiting."""
    server = serve(flags)
    ours, theirs = socket.socketpair()
    with Peer(ours) as child:
        with theirs:
            server.send("FORK_ID", payload, theirs.fileno())
        assert child.rest() == b""
    assert names(server.reports()) == ([] if flags else ["STARTED", "ERROR"])
    assert server.process.wait(20) == 100


@pytest.mark.parametrize("where", ["header", "payload", "byte", "two", "many"])
def test_descriptors_where_none_belong(serve, where):
    server = serve()
    data, fds = {
        "header": (frame(b"e"), 1),
        "payload": (b"abc", 1),
        "byte": (b"\0", 0),
        "two": (b"\0", 2),
        "many": (b"\0", 253),
    }[where]
    if where == "payload":
        server.sock.sendall(frame(b"e", b"abc")[:-3])
    elif where != "header":
        server.sock.sendall(frame(b"h"))
    socket.send_fds(server.sock, [data], [0] * fds)
    server.expect("STARTED", "ERROR")
    assert server.rest() == b""
    assert server.process.wait(20) == 100


WHOLE = frame(b"e", put_list([b"ok"])) + frame(b"a", b"\x01x") + frame(b"r", b"dump")


def test_end_of_file_in_mid_frame(serve):
    """At every position: what is whole is executed, the rest is dropped."""
    first = len(frame(b"e", put_list([b"ok"])))
    for cut in range(len(WHOLE)):
        server = serve()
        server.sock.sendall(WHOLE[:cut])
        status, reports, log = server.end()
        assert status == 0
        # without a command it may meet the end before it was ever idle
        assert names(reports) == ["STARTED"] or (cut < first and not reports)
        assert log == ["e 3 ok"] * (cut >= first) + ["left 0"]


@bounded
@given(st.binary(max_size=60))
@example(b"")
@example(b"e\0\0\0\0" * 10)
def test_garbage(stub_server, data):
    """Whatever comes, it ends, and with reports that can be read."""
    with Server(stub_server) as server:
        with contextlib.suppress(BrokenPipeError):
            server.sock.sendall(data)
        status, reports, _ = server.end()
        assert status in (0, 100)
        assert names(reports)[:1] in (["STARTED"], [])
        assert len(reports) <= 2 + len(data) // 5


def test_slow_peer(started):
    """A byte at a time, and forks in between by somebody else's frames."""
    for byte in frame(b"y", struct.pack("=Q", 3)):
        started.sock.sendall(bytes([byte]))
    assert started.report() == ("DONE", 3)


def test_reports_never_block_the_loop(server):
    """The application sends and does not read: it is served all the same."""
    count = 20_000
    for first in range(0, count, 100):
        tokens = range(first, first + 100)
        server.sock.sendall(b"".join(frame(b"y", struct.pack("=Q", n)) for n in tokens))
    with server.fork(1) as child:
        done_child = child.report()
        assert done_child[0] == "STARTED"
        done_token(child)
        child.run(b"exit:0")
        child.expect("RUNNING")
        child.rest()
    server.expect("STARTED")
    for n in range(count):
        assert server.report() == ("DONE", n)
    ((_, number, *_),) = server.expect("EXITED")
    assert number == 1


def test_reports_after_half_close_are_not_lost(server):
    """Unread until after the end of all children: they still arrive."""
    count = 20_000
    for first in range(0, count, 100):
        tokens = range(first, first + 100)
        server.sock.sendall(b"".join(frame(b"y", struct.pack("=Q", n)) for n in tokens))
    with server.fork(1) as child:
        child.run(b"exit:0")
        child.expect("STARTED", "RUNNING")
        child.rest()
    server.sock.shutdown(socket.SHUT_WR)
    reports = server.reports()
    assert len(reports) == count + 2
    assert reports[-1][:2] == ("EXITED", 1)


def test_application_that_reads_no_more(started):
    """EPIPE on a report: no signal, no end; commands are still executed."""
    started.sock.shutdown(socket.SHUT_RD)
    started.send("READY", struct.pack("=Q", 1))
    started.eval(b"ok")
    with started.fork(1) as child:
        child.expect("STARTED")
        child.run(b"exit:0")
        child.expect("RUNNING")
        child.rest()
    started.eval(b"ok")
    started.sock.shutdown(socket.SHUT_WR)
    assert started.process.wait(20) == 0
    assert [x for x in started.log() if x == "e 3 ok"] == ["e 3 ok"] * 2


def test_peak_memory(build, serve):
    """A26: an announced 16 MiB costs nothing, a sent one at most the cap."""
    if build.SANITIZE:
        pytest.skip("a sanitizer keeps what was freed")

    def peak(server):
        with open(f"/proc/{server.pid}/status") as status:
            return next(int(x.split()[1]) for x in status if x.startswith("VmHWM"))

    server = serve()
    server.expect("STARTED")
    done_token(server)
    before = peak(server)
    server.sock.sendall(struct.pack("=BI", ord("e"), FRAME_MAX) + b"x" * 100)
    server.sock.sendall(b"x" * (1 << 20))
    assert peak(server) - before < 3 * 1024
    server.sock.sendall(b"x" * (FRAME_MAX - (1 << 20) - 100))
    server.expect("ERROR")
    assert peak(server) - before < 16 * 1024 + 64 + 1024
    assert server.end()[0] == 0


def test_a_thousand_descriptors(started):
    """T13: what is over the cap is closed at once."""
    for _ in range(128):
        started.handle(0)
    done_token(started)
    files = f"/proc/{started.pid}/fd"
    before = len(os.listdir(files))
    for _ in range(1000):
        started.handle(0)
        (report,) = started.expect("ERROR")
        assert report[1:3] == ("handle", errno.EMFILE)
    assert len(os.listdir(files)) == before
    assert started.end()[0] == 0
