"""Forks of a server."""

import contextlib
import errno
import os
import resource
import signal
import socket
import struct

import pytest

from .reference import Peer, exec_payload, frame
from .server import FORK, done_token, names, spawn


def test_fork(started):
    with started.fork(7) as child, started.fork(8) as other:
        ((_, pid),) = child.expect("STARTED")
        other.expect("STARTED")
        assert pid not in (started.pid, os.getpid())
        child.eval(b"ok")
        child.run(b"exit:3")
        child.expect("RUNNING")
        assert child.rest() == b""
        ((_, number, exited, status, usage),) = started.expect("EXITED")
        assert (number, exited, status) == (7, pid, 3 << 8)
        assert usage[4] > 0  # maxrss
        other.run(b"kill:9")
        other.expect("RUNNING")
        ((_, number, _, status, _),) = started.expect("EXITED")
        assert (number, status) == (8, 9)
    assert started.end()[0] == 0


def test_fork_without_an_id_is_not_reported(started):
    with started.fork() as child:
        child.run(b"exit:3")
        child.expect("STARTED", "RUNNING")
        child.rest()
    status, reports, _ = started.end()
    assert (status, reports) == (0, [])


def test_fork_inherits_pending_arguments(started):
    started.send_list("ARGS", b"inherited")
    null = os.open("/dev/null", os.O_RDONLY)
    started.handle(null)
    os.close(null)
    with started.fork(1) as child:
        child.send_list("ARGS", b"own")
        child.run(b"dump")
        child.expect("STARTED", "RUNNING")
        lines = child.rest().decode().splitlines()
    handle = next(x.split()[1] for x in lines if x.startswith("handle"))
    assert [x for x in lines if x.startswith("bytes")] == [
        "bytes inherited",
        "bytes own",
    ]
    assert [x for x in lines if x.startswith("fd")] == [f"fd {handle}"]


def test_many_forks(started):
    """All asked for at once; a child holds none of its siblings' sockets."""
    with contextlib.ExitStack() as stack:
        children = {n: stack.enter_context(started.fork(n)) for n in range(100, 120)}
        pids = {}
        for number, child in children.items():
            child.run(b"dump")
            ((_, pids[number]), _) = child.expect("STARTED", "RUNNING")
            lines = child.rest().decode().splitlines()
            assert not [x for x in lines if x.startswith("fd")]
    assert len(set(pids.values())) == 20
    seen = {number: pid for _, number, pid, _, _ in started.expect(*["EXITED"] * 20)}
    assert seen == pids
    assert started.end()[0] == 0


@contextlib.contextmanager
def stopped(server):
    """What is sent meanwhile is all there when the server looks."""
    os.kill(server.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, server.pid, os.WSTOPPED | os.WNOWAIT)
    yield
    os.kill(server.pid, signal.SIGCONT)


def test_requests_that_wait(started):
    """In their order, before what follows; no child holds a socket that waits."""
    started.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    with contextlib.ExitStack() as stack:
        with stopped(started):
            # More than are received ahead.
            children = {n: stack.enter_context(started.fork(n)) for n in range(1, 81)}
            started.send_list("ARGS", b"later")
            late = stack.enter_context(started.fork(81))
        for child in [*children.values(), late]:
            child.run(b"dump")
        pids = []
        for child in children.values():
            ((_, pid), _) = child.expect("STARTED", "RUNNING")
            pids.append(pid)
            lines = child.rest().decode().splitlines()
            assert not [x for x in lines if x.startswith(("fd", "bytes"))]
        late.expect("STARTED", "RUNNING")
        assert "bytes later" in late.rest().decode().splitlines()
    exited = {n: pid for _, n, pid, _, _ in started.expect(*["EXITED"] * 81)}
    assert [exited[n] for n in children] == pids
    assert started.end()[0] == 0


def test_requests_that_wait_for_a_free_descriptor(started):
    """They are not received before there is a slot, which would lose them."""
    used = {int(name) for name in os.listdir(f"/proc/{started.pid}/fd")}
    free = min(set(range(len(used) + 1)) - used)
    limit = resource.prlimit(started.pid, resource.RLIMIT_NOFILE)
    assert free + 1 not in used
    resource.prlimit(started.pid, resource.RLIMIT_NOFILE, (free + 1, limit[1]))
    with contextlib.ExitStack() as stack:
        with stopped(started):
            children = [stack.enter_context(started.fork(n)) for n in range(1, 6)]
        for child in children:
            child.run(b"exit:0")
            assert names(child.reports())[-1] == "RUNNING"
    assert [x[0] for x in started.expect(*["EXITED"] * 5)] == ["EXITED"] * 5
    assert started.end()[0] == 0


def test_half_a_request_behind_another(started):
    ours, theirs = socket.socketpair()
    data = frame(b"F", struct.pack("=Q", 2))
    with Peer(ours) as half:
        with stopped(started), theirs:
            child = started.fork(1)
            socket.send_fds(started.sock, [data[:7]], [theirs.fileno()])
        with child:
            child.run(b"dump")
            child.expect("STARTED", "RUNNING")
            assert "\nfd " not in child.rest().decode()
        started.sock.sendall(data[7:])
        half.expect("STARTED")
    assert {x[1] for x in started.expect("EXITED", "EXITED")} == {1, 2}


def test_malformed_request_behind_others(serve):
    server = serve("d")
    server.expect("STARTED")
    with contextlib.ExitStack() as stack:
        with stopped(server):
            children = [stack.enter_context(server.fork(n)) for n in (1, 2)]
            server.send("FORK_ID", b"1234567", server.sock.fileno())
        assert server.expect("ERROR")[0][1] == "protocol"
        assert server.process.wait(20) == 100
        for child in children:
            child.expect("STARTED")
            done_token(child)
            child.sock.shutdown(socket.SHUT_WR)
            assert child.report() is None


def test_fork_of_a_fork(started):
    with started.fork(1) as child, child.fork(2) as grandchild:
        ((_, pid),) = child.expect("STARTED")
        ((_, grandpid),) = grandchild.expect("STARTED")
        assert pid != grandpid
        grandchild.run(b"exit:5")
        grandchild.expect("RUNNING")
        ((_, number, exited, status, _),) = child.expect("EXITED")
        assert (number, exited, status) == (2, grandpid, 5 << 8)
        child.sock.shutdown(socket.SHUT_WR)
        assert child.rest() == b""
        ((_, number, exited, status, _),) = started.expect("EXITED")
        assert (number, exited, status) == (1, pid, 0)


def test_forked_process_has_only_its_socket(started):
    """EOF when the template dies: no child keeps its socket open, or a sibling's."""
    with started.fork(1) as child, started.fork(2) as other:
        child.expect("STARTED")
        other.expect("STARTED")
        os.kill(started.pid, signal.SIGKILL)
        assert started.report() is None
        assert child.report() is None
        assert other.report() is None
    assert started.process.wait(20) == -signal.SIGKILL
    assert started.log() == []


def test_detached_outlives_the_template(serve):
    server = serve("d")
    server.expect("STARTED")
    with server.fork(1) as child:
        child.expect("STARTED")
        os.kill(server.pid, signal.SIGKILL)
        assert server.report() is None
        done_token(child)
        child.sock.shutdown(socket.SHUT_WR)
        assert child.report() is None


def test_failed_fork_is_told_to_its_owner(started):
    """... and the template lives."""
    started.eval(b"forkfail")
    with started.fork(1) as child:
        (report,) = child.expect("ERROR")
        text = os.strerror(errno.EAGAIN)
        assert report == ("ERROR", "fork", errno.EAGAIN, "OSError", text, "", "")
        assert child.report() is None
    with started.fork(2) as child:
        child.expect("STARTED")
    status, reports, _ = started.end()
    assert status == 0
    assert [(r[0], r[1]) for r in reports] == [("EXITED", 2)]


def test_fork_many_is_one_request(started):
    """Each has the socket that came with its id, and none of its siblings'."""
    numbers = range(1000, 1150)  # more than are made at a time
    with contextlib.ExitStack() as stack:
        children = started.fork_many(*numbers)
        for child in children.values():
            stack.enter_context(child)
        assert list(children) == list(numbers)
        pids = {}
        for number, child in children.items():
            child.run(b"dump")
            ((_, pids[number]), _) = child.expect("STARTED", "RUNNING")
            lines = child.rest().decode().splitlines()
            assert not [x for x in lines if x.startswith("fd")]
    seen = {n: pid for _, n, pid, _, _ in started.expect(*["EXITED"] * 150)}
    assert seen == pids
    assert started.end()[0] == 0


def test_fork_many_sends_the_sockets_first(started):
    """What is sent to them waits in the kernel until they are forked."""
    with contextlib.ExitStack() as stack:
        children = started.fork_many(1, 2, 3)
        for child in children.values():
            stack.enter_context(child).run(b"exit:4")
        for child in children.values():
            child.expect("STARTED", "RUNNING")
            assert child.rest() == b""
    assert [x[3] for x in started.expect(*["EXITED"] * 3)] == [4 << 8] * 3


def test_fork_many_of_which_one_fails(started):
    started.eval(b"forkfail")
    children = started.fork_many(1, 2)
    with children[1] as failed, children[2] as child:
        (report,) = failed.expect("ERROR")
        assert report[1:3] == ("fork", errno.EAGAIN)
        assert failed.report() is None
        child.expect("STARTED")
    assert names(started.end()[1]) == ["EXITED"]


def test_fork_many_after_an_error(started):
    started.eval(b"fail")
    started.expect("ERROR")
    for child in started.fork_many(1, 2).values():
        with child:
            assert child.expect("ERROR")[0][4] == "fail"
            assert child.report() is None
    assert started.end()[1] == []


def test_fork_many_without_free_descriptors(started):
    """No socket can be made: each is reported by its id, and all goes on."""
    started.eval(b"nofile")
    started.send("FORK_MANY", struct.pack("=2Q", 5, 6))
    for number in (5, 6):
        assert started.report() == ("FAILED", number, errno.EMFILE, FORK)
    started.eval(b"morefiles")
    with started.fork_many(7)[7] as child:
        child.expect("STARTED")
    assert started.end()[0] == 0


def test_fork_many_of_nothing_and_malformed(started):
    started.send("FORK_MANY")
    done_token(started)
    started.send("FORK_MANY", b"1234567")
    assert started.report()[1:3] == ("protocol", errno.EPROTO)
    assert started.end()[0] == 100


def test_fork_many_for_somebody_who_has_gone(server):
    """Not a thousand processes for nobody."""
    server.expect("STARTED")
    server.send("FORK_MANY", struct.pack("=1000Q", *range(1, 1001)))
    server.sock.close()
    assert server.process.wait(20) == 0


@pytest.mark.parametrize("broken", ["eval", "run"])
def test_after_an_error_forks_are_answered_with_it(started, broken):
    if broken == "eval":
        started.eval(b"fail")
    else:
        started.run(b"nofunc")
    (error,) = started.expect("ERROR")
    started.eval(b"ok")
    started.send("IMPORT", b"\xff malformed")
    started.send("READY", struct.pack("=Q", 1))
    started.send("EXEC", b"malformed")
    started.send("TEXT", b"\xff")
    for number in (0, 5):
        with started.fork(number) as child:
            assert child.report() == error
            assert child.report() is None
    status, reports, log = started.end()
    assert (status, reports) == (0, [])
    assert log[-1] == "left 0"
    assert not [line for line in log if " ok" in line]


def test_after_an_error_programs_are_refused(started):
    started.eval(b"fail")
    started.expect("ERROR")
    spawn(started, 5, exec_payload([b"/bin/true"], handles=1), 0)
    assert started.report() == ("FAILED", 5, errno.ECANCELED, 0)
    with started.fork(6) as child:
        child.expect("ERROR")
    assert started.end()[0] == 0


def test_error_goes_on_to_processes_of_before(started):
    """A child forked before the error is its own; later ones get the error."""
    with started.fork(1) as child:
        child.expect("STARTED")
        started.eval(b"fail")
        started.expect("ERROR")
        done_token(child)
        child.eval(b"fail")
        child.expect("ERROR")
        with child.fork(2) as grandchild:
            grandchild.expect("ERROR")
