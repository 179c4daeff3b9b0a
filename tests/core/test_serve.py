"""The server loop, driven over its socket: stub_server.c stands in for Python."""

import contextlib
import errno
import os
import select
import signal
import socket
import struct
import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from .reference import FRAME_MAX, Peer, exec_payload, frame, put_list

bounded = settings(max_examples=100, deadline=None, database=None, print_blob=True)

FORK = 1  # enum afork_stage
SETUP, CWD, EXEC = 2, 3, 4


class Server(Peer):
    """A stub server and our end of its socket."""

    def __init__(self, program: str, flags: str = "") -> None:
        ours, theirs = socket.socketpair()
        super().__init__(ours)
        self.log_fd, log = os.pipe()
        command = [program, str(theirs.fileno()), str(log), flags]
        with theirs:
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno(), log],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PATH": "/bin:/usr/bin"},
            )
        os.close(log)
        self.pid = self.process.pid

    def __exit__(self, *exc) -> None:
        """However the test ended, nothing is left of the server."""
        self.sock.close()
        try:
            self.log()
        finally:
            os.close(self.log_fd)
            self.process.kill()
            self.process.wait()

    def log(self) -> list[str]:
        """Wait until every process has gone; what they called, without pids."""
        text = b""
        while True:
            ready, _, _ = select.select([self.log_fd], [], [], 20)
            assert ready, "somebody is still there"
            more = os.read(self.log_fd, 65536)
            if not more:
                return [line.split(" ", 1)[-1] for line in text.decode().splitlines()]
            text += more

    def end(self) -> tuple:
        """Half-close; return the exit status, the reports, and the log."""
        self.sock.shutdown(socket.SHUT_WR)
        reports = self.reports()
        return self.process.wait(20), reports, self.log()


@pytest.fixture
def serve(stub_server):
    with contextlib.ExitStack() as stack:
        yield lambda flags="": stack.enter_context(Server(stub_server, flags))


@pytest.fixture
def server(serve):
    return serve()


@pytest.fixture
def started(server):
    server.expect("STARTED")
    return server


def names(reports) -> list[str]:
    return [report[0] for report in reports]


def done_token(peer: Peer, token: int = 1) -> None:
    """Wait until everything before this has been executed."""
    peer.send("READY", struct.pack("=Q", token))
    assert peer.report() == ("DONE", token)


# Commands and reports


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


def test_malformed_stats(started):
    started.send("STATS", b"1234567")
    assert started.end()[0] == 100


# Forks


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


# Children


def test_strangers_zombie_hides_nobody(started):
    started.eval(b"stranger")
    with started.fork(1) as child:
        child.run(b"exit:1")
        child.expect("STARTED", "RUNNING")
        child.rest()
        ((_, number, _, status, _),) = started.expect("EXITED")
        assert (number, status) == (1, 1 << 8)
    assert started.end()[0] == 0


def test_stolen_child(started):
    """Evaluated code waited for it: reported, with a status of -1."""
    with started.fork(1) as child:
        child.run(b"exit:1")
        started.eval(b"steal")
        child.expect("STARTED", "RUNNING")
        child.rest()
        ((_, number, _, status, usage),) = started.expect("EXITED")
        assert (number, status, any(usage)) in (
            (1, -1, False),
            (1, 256, True),  # reaped before eval came
        )


def test_stolen_child_then_end_of_file(server):
    """The last command took it: there will be no signal to wait for."""
    with server.fork(1) as child:
        child.run(b"exit:0")
        server.eval(b"steal")
        server.sock.shutdown(socket.SHUT_WR)
        assert names(server.reports()) == ["STARTED", "EXITED"]
    assert server.process.wait(20) == 0


def test_half_close_keeps_reaping(started):
    """Until the last child has gone; then it ends by itself."""
    with started.fork(1) as one, started.fork(2) as two:
        for child in (one, two):
            child.run(b"hold")
            child.expect("STARTED", "RUNNING")
        started.sock.shutdown(socket.SHUT_WR)
        one.sock.shutdown(socket.SHUT_WR)
        ((_, number, _, status, _),) = started.expect("EXITED")
        assert (number, status) == (1, 0)
        assert started.process.poll() is None
        two.sock.shutdown(socket.SHUT_WR)
        ((_, number, _, _, _),) = started.expect("EXITED")
        assert number == 2
        assert started.report() is None
        assert started.process.wait(20) == 0


def test_hang_up_ends_it_and_its_children(started):
    """The application has gone: everything goes, also what would not."""
    with started.fork(1) as child, started.fork() as other:
        for peer in (child, other):
            peer.run(b"hold")
            peer.expect("STARTED", "RUNNING")
        started.sock.close()
        assert child.rest() == b""
        assert other.rest() == b""
        assert started.process.wait(20) == 0
        started.log()


def test_hang_up_after_half_close(started):
    with started.fork(1) as child:
        child.run(b"hold")
        child.expect("STARTED", "RUNNING")
        started.sock.shutdown(socket.SHUT_WR)
        started.sock.close()
        assert child.rest() == b""
        assert started.process.wait(20) == 0


def test_signals_do_not_end_a_template(started):
    for sig in (
        signal.SIGINT,
        signal.SIGQUIT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGTSTP,
        signal.SIGCHLD,
    ):
        os.kill(started.pid, sig)
        done_token(started, sig)
    started.eval(b"ignore")
    os.kill(started.pid, signal.SIGTERM)
    done_token(started)
    assert started.end()[0] == 0


def mask(lines, name: str) -> set[int]:
    (line,) = [x for x in lines if x.startswith(name)]
    bits = int(line.split()[1], 16)
    # 32 and 33 are glibc's; some starters leave them ignored, and sigaction
    # refuses to change that.
    return {n for n in range(1, 65) if bits & 1 << n - 1} - {32, 33}


def test_workers_signals(build, started):
    """Nothing of the template's set-up is left; what eval changed is."""
    asan = {signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV} if build.SANITIZE else set()
    with started.fork() as child:
        child.run(b"dump")
        child.expect("STARTED", "RUNNING")
        lines = child.rest().decode().splitlines()
    assert mask(lines, "SigBlk") == set()
    assert mask(lines, "SigIgn") == set()
    assert mask(lines, "SigCgt") == asan
    started.eval(b"ignore")
    with started.fork() as child:
        child.run(b"dump")
        child.expect("STARTED", "RUNNING")
        lines = child.rest().decode().splitlines()
    assert mask(lines, "SigIgn") == {signal.SIGCHLD, signal.SIGTERM}
    assert mask(lines, "SigBlk") == set()
    assert mask(lines, "SigCgt") == asan


def test_chld_is_open_while_code_runs(started):
    """... and closed again behind it: else its signal is lost before the wait."""
    started.eval(b"mask")
    started.run(b"exit:0")
    log = started.log()
    assert signal.SIGCHLD not in mask(log, "SigBlk:")
    assert "find exit:0" in log


# Lost descriptors


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


def test_started_is_the_first_report(server):
    """Also when the first request fails without running anything."""
    spawn(server, 5, exec_payload([b"x"], program=b"/nonexistent"))
    started, failed = server.expect("STARTED", "FAILED")
    assert started == ("STARTED", server.pid)
    assert failed == ("FAILED", 5, errno.ENOENT, EXEC)


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


# Programs


def spawn(peer, number, payload, *handles):
    for fd in handles:
        peer.handle(fd)
    peer.send("SPAWN", struct.pack("=Q", number) + payload)


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


# The original's protocol


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


# Hostile and broken peers


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
