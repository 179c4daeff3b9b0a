"""The server loop, driven over its socket: stub_server.c stands in for Python."""

import errno
import os
import socket
import struct

import pytest

from .reference import frame, put_list
from .server import FORK, done_token


def test_idle(server):
    """Nothing was sent: one report, and an end."""
    assert server.report() == ("STARTED", server.pid)
    assert server.end() == (0, [], ["left 0"])


def test_started_comes_before_python_runs(server):
    server.eval(b"ok")
    server.eval(b"fail")
    (status, reports, log) = server.end()
    assert status == 0
    assert reports == [
        ("STARTED", server.pid),
        ("ERROR", "eval", 22, "ValueError", "fail", "Traceback", "stub.c"),
    ]
    assert log == ["e 3 ok", "e 5 fail", "left 0"]


def test_started_without_pidfd(serve):
    """Linux without pidfd_open: the bare form, from a forked process too."""
    server = serve()
    server.expect("STARTED")
    server.eval(b"nopidfd")
    with server.fork() as child:
        ((_, pid),) = child.expect("STARTED_BARE")
        assert pid > 0
        child.run(b"exit:0")
        child.expect("RUNNING")
    assert server.end()[0] == 0


@pytest.mark.parametrize("name", ["EVAL", "EVAL_TYPED", "IMPORT", "SET"])
def test_commands_for_python(started, name):
    payload = put_list([b"code", b"x" * 100_000])
    started.send(name, payload)
    started.send_list(name)
    started.sock.shutdown(socket.SHUT_WR)
    letter = {"EVAL": "e", "EVAL_TYPED": "E", "IMPORT": "m", "SET": "s"}[name]
    log = started.log()
    assert log[0] == f"{letter} {len(payload)} code"
    if name != "EVAL":
        assert log[1] == f"{letter} 0 "


def test_run_with_arguments(serve):
    """Strings, text and descriptors, in order; nothing else is open."""
    server = serve()
    server.send_list("ARGS", b"one", b"", b"two")
    r, w = os.pipe()
    server.handle(w)
    server.send_list("TEXT", "é".encode())
    server.send_list("ARGS")
    server.handle(w)
    os.close(w)
    server.run(b"dump")
    reports = server.expect("STARTED", "RUNNING")
    assert reports[0] == ("STARTED", server.pid)
    lines = server.rest().decode().splitlines()
    handles = [line.split()[1] for line in lines if line.startswith("handle")]
    assert len(handles) == 2
    first, second = handles
    values = [x for x in lines if x.split()[0] in ("bytes", "text", "handle")]
    assert values == [
        "bytes one",
        "bytes ",
        "bytes two",
        f"handle {first}",
        "text é",
        f"handle {second}",
    ]
    assert sorted(x.split()[1] for x in lines if x.startswith("fd")) == sorted(handles)
    assert server.process.wait(20) == 0
    assert os.read(r, 1) == b""
    os.close(r)
    assert server.log() == ["find dump", "left 1"]


def test_bytes_behind_run_are_the_functions(server):
    server.sock.sendall(frame(b"r", b"hold") + b"e\xff\xff\xff\xffusers own")
    server.expect("STARTED", "RUNNING")
    server.sock.shutdown(socket.SHUT_WR)
    assert server.rest() == b""
    assert server.process.wait(20) == 0


def test_run_of_nothing(started):
    started.run(b"nofunc")
    started.run(b"dump")  # too late
    status, reports, log = started.end()
    assert (status, log) == (0, ["find nofunc", "left 0"])
    assert reports == [
        ("ERROR", "run", 22, "ValueError", "no such function", "Traceback", "stub.c")
    ]


def test_ready(started):
    for token in (0, 1, 2**64 - 1):
        done_token(started, token)
    started.send("READY", b"1234567")
    assert started.end()[0] == 100


def test_ready_is_answered_before_anything_waits(server):
    """The reports of one batch come in the order of their commands."""
    batch = b"".join(frame(b"y", struct.pack("=Q", n)) for n in range(100))
    server.sock.sendall(batch)
    server.expect("STARTED")
    assert [server.report() for _ in range(100)] == [("DONE", n) for n in range(100)]


def test_stats(started):
    """In its turn, also after an error; an answer for each token."""
    started.send("STATS", struct.pack("=Q", 7))
    assert started.report() == ("STATS", 7, b"\1k")
    started.eval(b"fail")
    started.expect("ERROR")
    started.send("STATS", struct.pack("=Q", 8))
    assert started.report() == ("STATS", 8, b"\1k")
    assert started.end()[0] == 0


@pytest.mark.parametrize("how", ["idle", "run", "end"])
def test_too_many_descriptors_in_flight(server, how):
    """The socket has room all the time: that is not what is waited for."""
    server.eval(b"ok")
    server.expect("STARTED")
    server.eval(b"crowd:5")
    if how == "run":
        server.run(b"exit:0")
        server.expect("RUNNING")
        assert server.log()[-1] == "left 1"
        return
    if how == "end":
        server.send("READY", struct.pack("=Q", 1))
        status, reports, log = server.end()
        assert reports == [("DONE", 1)]
    else:
        done_token(server)
        status, _, log = server.end()
    assert status == 0
    assert log[-1] == "left 0"


def test_malformed_stats(started):
    started.send("STATS", b"1234567")
    assert started.end()[0] == 100


def test_lost_socket_is_reported_by_id(started):
    started.eval(b"nofile")
    with started.fork(7) as child:
        assert started.report() == ("FAILED", 7, errno.EMFILE, FORK)
        assert child.rest() == b""
    with started.fork(0) as child:  # the original's fork: in silence
        assert child.rest() == b""
    done_token(started)
    started.eval(b"morefiles")
    with started.fork(9) as child:  # T4: and then it goes on
        child.expect("STARTED")


def test_lost_argument_of_run(started):
    started.eval(b"nofile")
    started.handle(0)
    started.eval(b"morefiles")
    started.run(b"dump")
    (report,) = started.expect("ERROR")
    assert report[1:3] == ("run", errno.EMFILE)
    assert started.end()[0] == 0


def test_too_many_pending_descriptors(started):
    """64 that wait for run, and as many again for one request."""
    for _ in range(128):
        started.handle(0)
    done_token(started)
    started.handle(0)
    (report,) = started.expect("ERROR")
    assert report[1:3] == ("handle", errno.EMFILE)
    assert started.end()[0] == 0
