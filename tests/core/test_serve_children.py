"""Children of a server: their exits, the end of a server, signals."""

import os
import signal
import socket

from .server import done_token, mask, names


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
