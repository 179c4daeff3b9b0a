"""Programs that a server starts or becomes."""

import errno
import os
import signal
import socket

import pytest

from .reference import exec_payload
from .server import CWD, EXEC, SETUP, mask, spawn


def test_spawn(started, probe):
    r, w = os.pipe()
    spawn(
        started,
        5,
        exec_payload([probe.encode(), b"dump"], env=[b"A=1"], handles=1, fds=[(0, 1)]),
        w,
    )
    os.close(w)
    ((_, number, pid), exited) = started.expect("SPAWNED", "EXITED")
    assert number == 5
    assert exited[1:4] == (5, pid, 0)
    with open(r) as pipe:
        lines = pipe.read().splitlines()
    assert [x for x in lines if x.startswith("env")] == ["env A=1"]
    assert sorted(x.split()[1] for x in lines if x.startswith("fd")) == ["0", "1", "2"]
    for name in ("SigBlk", "SigIgn", "SigCgt"):
        assert mask(lines, name) == set()
    assert f"ids {pid} {started.pid}" in " ".join(lines)
    assert f"deathsig {int(signal.SIGKILL)}" in lines
    # the template kept nothing
    with started.fork() as child:
        child.run(b"dump")
        child.expect("STARTED", "RUNNING")
        assert "handle" not in child.rest().decode()


def test_spawn_without_pidfd(started, probe):
    started.eval(b"nopidfd")
    spawn(started, 5, exec_payload([probe.encode(), b"exit", b"3"]))
    ((_, _, pid), exited) = started.expect("SPAWNED_BARE", "EXITED")
    assert exited[1:4] == (5, pid, 3 << 8)


def test_spawned_inherits_the_environment(serve, probe, monkeypatch):
    monkeypatch.setenv("AFORK_TEST_ENV", "yes")
    server = serve()
    server.expect("STARTED")
    r, w = os.pipe()
    spawn(
        server, 1, exec_payload([probe.encode(), b"dump"], handles=1, fds=[(0, 1)]), w
    )
    os.close(w)
    with open(r) as pipe:
        assert "env AFORK_TEST_ENV=yes\n" in pipe.read()
    server.expect("SPAWNED", "EXITED")


@pytest.mark.parametrize(
    ("change", "number", "stage"),
    [
        ({"program": b"/nonexistent"}, errno.ENOENT, EXEC),
        ({"program": b"/etc/passwd"}, errno.EACCES, EXEC),
        ({"program": b"nowhere"}, errno.ENOENT, EXEC),
        ({"program": b"true", "search": b"/usr:/", "env": []}, errno.ENOENT, EXEC),
        ({"cwd": b"/nonexistent"}, errno.ENOENT, CWD),
        ({"cwd_handle": 0, "handles": 1}, errno.ENOTDIR, CWD),
        ({"fds": [(-1 - 99, 0)]}, errno.EBADF, SETUP),
        ({"fds": [(-1, 2**31 - 1)]}, errno.EBADF, SETUP),
        ({"group": 2**31 - 1}, errno.EPERM, SETUP),
    ],
)
def test_failed_spawn(started, change, number, stage):
    spawn(started, 5, exec_payload([b"x"], **change), *[0] * change.get("handles", 0))
    assert started.report() == ("FAILED", 5, number, stage)
    # and the next one works
    spawn(started, 6, exec_payload([b"true"], search=b"/bin:/usr/bin", env=[]))
    started.expect("SPAWNED", "EXITED")


def test_spawn_with_a_lost_descriptor(started):
    started.eval(b"nofile")
    spawn(started, 5, exec_payload([b"/bin/true"], handles=2), 0, 0)
    assert started.report() == ("FAILED", 5, errno.EMFILE, SETUP)
    started.eval(b"morefiles")
    # Both are consumed: the tombstones must not hit somebody else's run.
    with started.fork() as child:
        child.run(b"dump")
        child.expect("STARTED", "RUNNING")
        assert "handle" not in child.rest().decode()


def test_programs_die_with_the_template(started, probe):
    hold, hold_w = os.pipe()
    r, w = os.pipe()
    payload = exec_payload([probe.encode(), b"hold"], handles=2, fds=[(0, 0), (1, 1)])
    spawn(started, 1, payload, hold, w)
    os.close(hold)
    os.close(w)
    started.expect("SPAWNED")
    started.sock.close()
    assert os.read(r, 1) == b""
    os.close(r)
    os.close(hold_w)


def test_half_close_waits_for_programs(started, probe):
    hold, hold_w = os.pipe()
    spawn(
        started,
        1,
        exec_payload([probe.encode(), b"hold"], handles=1, fds=[(0, 0)]),
        hold,
    )
    os.close(hold)
    started.expect("SPAWNED")
    started.sock.shutdown(socket.SHUT_WR)
    os.close(hold_w)
    started.expect("EXITED")
    assert started.report() is None


def test_exec(started, probe):
    """A fork becomes a program; its parent reports how it ended."""
    r, w = os.pipe()
    with started.fork(1) as child:
        child.handle(w)
        os.close(w)
        argv = [probe.encode(), b"dump", b"last"]
        payload = exec_payload(argv, env=[], handles=1, fds=[(0, 1)], session=1)
        child.send("EXEC", payload)
        ((_, pid),) = child.expect("STARTED")
        assert child.report() is None  # closed by exec
        with open(r) as pipe:
            lines = pipe.read().splitlines()
    assert "arg last" in lines
    assert f"ids {pid} {started.pid} {pid} {pid}" in lines
    assert sorted(x.split()[1] for x in lines if x.startswith("fd")) == ["0", "1", "2"]
    for name in ("SigBlk", "SigIgn", "SigCgt"):
        assert mask(lines, name) == set()
    assert f"deathsig {int(signal.SIGKILL)}" in lines
    assert started.expect("EXITED")[0][1:4] == (1, pid, 0)


@pytest.mark.parametrize(
    ("change", "stage", "number", "filename"),
    [
        ({"program": b"/nonexistent"}, "exec", errno.ENOENT, "/nonexistent"),
        ({"cwd": b"/nonexistent"}, "cwd", errno.ENOENT, "/nonexistent"),
        ({"cwd_handle": 0, "handles": 1}, "cwd", errno.ENOTDIR, ""),
        ({"fds": [(-1 - 99, 0)]}, "setup", errno.EBADF, ""),
        # the map had replaced the control socket's number before it failed
        (
            {"program": b"/nonexistent", "fds": [(-1, n) for n in range(3, 40)]},
            "exec",
            errno.ENOENT,
            "/nonexistent",
        ),
    ],
)
def test_failed_exec(started, change, stage, number, filename):
    with started.fork(1) as child:
        for _ in range(change.get("handles", 0)):
            child.handle(0)
        child.send("EXEC", exec_payload([b"x"], **change))
        _, report = child.expect("STARTED", "ERROR")
        text = os.strerror(number)
        assert report == ("ERROR", stage, number, "OSError", text, "", filename)
        child.eval(b"ok")  # is not executed
        with child.fork(2) as grandchild:
            assert grandchild.report() == report
        child.sock.shutdown(socket.SHUT_WR)
        assert child.report() is None
    started.expect("EXITED")


def test_exec_with_a_lost_descriptor(started):
    with started.fork(1) as child:
        child.expect("STARTED")
        child.eval(b"nofile")
        child.handle(0)
        child.eval(b"morefiles")
        child.send("EXEC", exec_payload([b"/bin/true"], handles=1))
        (report,) = child.expect("ERROR")
        assert report[1:3] == ("exec", errno.EMFILE)


def test_started_is_the_first_report(server):
    """Also when the first request fails without running anything."""
    spawn(server, 5, exec_payload([b"x"], program=b"/nonexistent"))
    started, failed = server.expect("STARTED", "FAILED")
    assert started == ("STARTED", server.pid)
    assert failed == ("FAILED", 5, errno.ENOENT, EXEC)
