"""Spares: handed over, dropped, killed at every point, and never missed."""

import contextlib
import errno
import os
import resource
import select
import signal
import struct

import pytest

from .reference import exec_payload, put_list
from .server import Server, done_token


class Template(Server):
    """A stub server with spares, and what its log says of them."""

    pending = b""

    def line(self) -> str:
        """The next line of the log."""
        while b"\n" not in self.pending:
            ready, _, _ = select.select([self.log_fd], [], [], 20)
            assert ready, "nothing happens"
            more = os.read(self.log_fd, 65536)
            assert more, "everybody has gone"
            self.pending += more
        line, _, self.pending = self.pending.partition(b"\n")
        return line.decode()

    def pids(self, n: int, what: str = "warm") -> set[int]:
        """Wait until n processes have said so."""
        found: set[int] = set()
        while len(found) < n:
            pid, _, text = self.line().partition(" ")
            if text == what:
                found.add(int(pid))
        return found

    def spares(self, n: int) -> set[int]:
        self.send("SPARES", struct.pack("=I", n))
        return self.pids(n)

    def log(self) -> list[str]:
        rest = [x.split(" ", 1)[-1] for x in self.pending.decode().splitlines()]
        self.pending = b""
        return rest + super().log()


def pid_of(child) -> int:
    ((_, pid),) = child.expect("STARTED")
    return pid


def stop(pid: int) -> None:
    """Stop a process of somebody else's, and wait until it has."""
    os.kill(pid, signal.SIGSTOP)
    while True:
        with open(f"/proc/{pid}/stat") as file:
            if file.read().rpartition(") ")[2][0] == "T":
                return
        os.sched_yield()


@pytest.fixture
def template(stub_server):
    with Template(stub_server) as server:
        server.expect("STARTED")
        yield server


def test_a_start_is_given_to_a_spare(template):
    spares = template.spares(2)
    with template.fork(7) as child:
        pid = pid_of(child)
        assert pid in spares
        spares |= template.pids(1)  # the next one
        child.eval(b"ok")
        child.run(b"exit:3")
        child.expect("RUNNING")
        assert child.rest() == b""
    ((_, number, exited, status, usage),) = template.expect("EXITED")
    assert (number, exited, status) == (7, pid, 3 << 8)
    assert usage[4] > 0
    status, reports, log = template.end()
    assert (status, reports) == (0, [])  # those that were not used
    assert log.count("left 0") == 3  # and the template


def test_none_is_made_without_being_asked_for(template):
    with template.fork(1) as child:
        assert pid_of(child)
    assert "warm" not in template.end()[2]


def test_they_hold_nothing_of_each_other(template):
    spares = template.spares(4)
    sockets = set()
    for pid in spares:
        links = {
            os.readlink(f"/proc/{pid}/fd/{n}")
            for n in os.listdir(f"/proc/{pid}/fd")
            if int(n) > 2
        }
        mine = {x for x in links if x.startswith("socket:")}
        assert len(mine) == 1  # where it waits
        assert not sockets & mine
        sockets |= mine
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(template.fork(n)) for n in range(1, 9)]
        for child in children:  # more than there are spares
            child.run(b"dump")
            child.expect("STARTED", "RUNNING")
            lines = child.rest().decode().splitlines()
            assert not [x for x in lines if x.startswith("fd")]
    template.expect(*["EXITED"] * 8)
    assert template.end()[0] == 0


def test_they_die_with_the_template(template):
    template.spares(3)
    template.process.kill()
    assert template.report() is None
    assert "left 1" not in template.log()  # its end of file: all are gone


def test_many_are_given_to_them_first(template):
    spares = template.spares(2)
    with contextlib.ExitStack() as stack:
        children = template.fork_many(*range(1, 6))
        for child in children.values():
            stack.enter_context(child)
        pids = {pid_of(child) for child in children.values()}
        assert spares <= pids
        assert len(pids) == 5
    template.expect(*["EXITED"] * 5)


@pytest.mark.parametrize(
    ("letter", "payload"),
    [
        ("EVAL", put_list([b"ok"])),
        ("EVAL_TYPED", put_list([b"x"])),
        ("IMPORT", put_list([b"x"])),
        ("SET", put_list([b"x", b"y"])),
    ],
)
def test_dropped_when_the_template_changes(template, letter, payload):
    spares = template.spares(2)
    template.send(letter, payload)
    assert template.pids(2, "left 0") == spares
    with template.fork(1) as child:
        assert pid_of(child) not in spares


def test_they_have_the_arguments_of_the_template(template):
    spares = template.spares(2)
    template.send_list("ARGS", b"one")
    null = os.open("/dev/null", os.O_RDONLY)
    template.handle(null)
    os.close(null)
    for number in (1, 2):
        with template.fork(number) as child:
            child.run(b"dump")
            ((_, pid), _) = child.expect("STARTED", "RUNNING")
            assert pid not in spares
            lines = child.rest().decode().splitlines()
            assert "bytes one" in lines
            assert len([x for x in lines if x.startswith("handle")]) == 1
            template.expect("EXITED")
        spares = set() if number == 1 else spares
        template.pids(1)


def test_kept_while_a_program_is_started(template):
    """Its descriptors are pending for a moment, and gone again."""
    spares = template.spares(1)
    template.handle(template.sock.fileno())
    payload = struct.pack("=Q", 9) + exec_payload([b"true"], search=b"/bin", handles=1)
    template.send("SPAWN", payload)
    template.expect("SPAWNED", "EXITED")
    with template.fork(1) as child:
        assert pid_of(child) in spares


def test_killed_while_idle(template):
    (spare,) = template.spares(1)
    os.kill(spare, signal.SIGKILL)
    (other,) = template.pids(1)  # somebody has noticed
    assert other != spare
    with template.fork(1) as child:
        assert pid_of(child) == other
    assert [r[0] for r in template.end()[1]] == ["EXITED"]


def test_killed_and_not_noticed_yet(template):
    """The template is busy when they die: it finds out when it writes."""
    spares = template.spares(3)
    stop(template.pid)
    for pid in spares:
        os.kill(pid, signal.SIGKILL)
    with template.fork(1) as child:
        child.run(b"exit:3")
        os.kill(template.pid, signal.SIGCONT)
        (_, pid), _ = child.expect("STARTED", "RUNNING")
        assert pid not in spares
    ((_, number, exited, status, _),) = template.expect("EXITED")
    assert (number, exited, status) == (1, pid, 3 << 8)


@pytest.mark.parametrize("others", [0, 1])
def test_killed_while_being_handed_over(template, others):
    """Its request goes to another one, or to a fork, with all that was sent."""
    spares = template.spares(1 + others)
    for pid in spares:
        stop(pid)
    with template.fork(5) as child:
        child.send_list("ARGS", b"kept")
        child.run(b"dump")
        done_token(template)
        for pid in spares:
            os.kill(pid, signal.SIGKILL)
        ((_, pid), _) = child.expect("STARTED", "RUNNING")
        assert pid not in spares
        assert "bytes kept" in child.rest().decode().splitlines()
    ((_, number, exited, status, _),) = template.expect("EXITED")
    assert (number, exited, status) == (5, pid, 0)
    assert template.end()[1] == []


@pytest.mark.parametrize("others", [0, 1])
def test_stopped_while_being_handed_over(template, others):
    """It is killed before its request goes elsewhere."""
    template.eval(b"patience:50")
    spares = template.spares(1 + others)
    for pid in spares:
        stop(pid)
    with template.fork(5) as child:
        child.send_list("ARGS", b"kept")
        child.run(b"dump")
        ((_, pid), _) = child.expect("STARTED", "RUNNING")
        assert pid not in spares
        assert "bytes kept" in child.rest().decode().splitlines()
    ((_, number, exited, status, _),) = template.expect("EXITED")
    assert (number, exited, status) == (5, pid, 0)
    status, reports, log = template.end()
    assert (status, reports) == (0, [])
    assert log.count("left 0") >= 1 + others  # and not the one that was killed


def test_stopped_while_idle(template):
    """One that cannot notice that it is not needed keeps nobody waiting."""
    for pid in template.spares(2):
        stop(pid)
    assert template.end()[0] == 0


def test_stopped_when_its_template_becomes_something_else(template):
    template.eval(b"patience:50")
    (spare,) = template.spares(1)
    stop(spare)
    with template.fork(5) as child:
        template.run(b"hold")  # the child would die with it
        template.expect("RUNNING")
        assert pid_of(child) != spare


@pytest.mark.parametrize("letter", ["ARGS", "TEXT", "HANDLE", "EVAL"])
def test_a_template_changes_while_one_is_being_handed_over(template, letter):
    """Who replaces it has nothing that came after the request."""
    template.eval(b"patience:50")
    (spare,) = template.spares(1)
    stop(spare)
    with template.fork(5) as child:
        if letter == "HANDLE":
            with open("/dev/null") as file:
                template.handle(file.fileno())
        elif letter == "EVAL":
            template.eval(b"nopidfd")
        else:
            template.send_list(letter, b"late")
        child.run(b"dump")
        ((_, pid), _) = child.expect("STARTED", "RUNNING")
        assert pid != spare
        lines = child.rest().decode().splitlines()
        assert not [x for x in lines if x.startswith(("bytes", "text", "handle"))]


def test_killed_just_after_being_handed_over(template):
    """The answer is there when its end is: reported by the id of the request."""
    (spare,) = template.spares(1)
    stop(template.pid)
    with template.fork(5) as child:
        os.kill(template.pid, signal.SIGCONT)
        assert pid_of(child) == spare
        os.kill(spare, signal.SIGKILL)
        assert child.report() is None
    ((_, number, exited, status, _),) = template.expect("EXITED")
    assert (number, exited, status) == (5, spare, signal.SIGKILL)


def test_the_end_of_file_while_one_is_being_handed_over(template):
    """Nobody asks any more, but what was asked for is done."""
    (spare,) = template.spares(1)
    stop(spare)
    with template.fork(5) as child:
        child.run(b"exit:3")
        done_token(template)
        template.sock.shutdown(1)
        os.kill(spare, signal.SIGKILL)
        child.expect("STARTED", "RUNNING")
        assert child.rest() == b""
    ((_, number, _, status, _),) = template.expect("EXITED")
    assert (number, status) == (5, 3 << 8)
    assert template.end()[0] == 0


def test_the_copy_in_the_template_hides_no_end(template):
    template.spares(1)
    with template.fork(5) as child:
        child.run(b"hold")
        child.expect("STARTED", "RUNNING")
        child.sock.shutdown(1)
        assert child.rest() == b""


def test_fork_refused_while_refilling(template):
    """Nobody is told, and it is tried again."""
    template.eval(b"forkfail")
    (spare,) = template.spares(1)
    with template.fork(1) as child:
        assert pid_of(child) == spare
    assert [r[0] for r in template.end()[1]] == ["EXITED"]


def test_given_up_when_descriptors_are_short(template):
    """A request finds room: a spare makes it."""
    template.spares(3)
    taken = set(map(int, os.listdir(f"/proc/{template.pid}/fd")))
    highest = max(taken)
    handles = 3 + len(set(range(highest)) - taken)
    limit = resource.prlimit(template.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(template.pid, resource.RLIMIT_NOFILE, (highest + 1, limit[1]))
    null = os.open("/dev/null", os.O_RDONLY)
    for _ in range(handles):  # each takes a slot for good
        template.handle(null)
        done_token(template)
    os.close(null)
    assert len(template.pids(3, "left 0")) == 3
    resource.prlimit(template.pid, resource.RLIMIT_NOFILE, limit)
    with template.fork(1) as child:
        assert pid_of(child)
        child.run(b"dump")
        child.expect("RUNNING")
        assert child.rest().count(b"handle") == handles


def test_who_waits_for_them_is_answered_without_them(template):
    """They cannot be made: with the next attempt nobody is kept waiting."""
    template.eval(b"nofile")
    template.send("SPARES", struct.pack("=I", 2))
    template.send("READY", struct.pack("=QB", 7, 1))
    assert template.report() == ("DONE", 7)
    template.eval(b"morefiles")
    template.pids(2)
    template.send("READY", struct.pack("=QB", 8, 1))
    assert template.report() == ("DONE", 8)
    template.send("READY", struct.pack("=QB", 9, 1) + b"x")
    assert template.report()[1:3] == ("protocol", errno.EPROTO)


def test_none_without_descriptors(template):
    template.eval(b"nofile")
    template.send("SPARES", struct.pack("=I", 2))
    done_token(template)
    template.send("FORK_MANY", struct.pack("=Q", 5))
    assert template.report()[:3] == ("FAILED", 5, errno.EMFILE)
    template.eval(b"morefiles")
    template.pids(2)


def test_fewer_and_none(template):
    spares = template.spares(3)
    template.send("SPARES", struct.pack("=I", 1))
    assert template.pids(2, "left 0") < spares
    template.send("SPARES", struct.pack("=I", 0))
    assert template.pids(1, "left 0") < spares


def test_gone_when_nobody_needs_them(template):
    template.eval(b"period:200")
    template.send("SPARES", struct.pack("=I", 4))
    born = gone = 0
    while not born or gone < born:
        what = template.line().partition(" ")[2]
        born += what == "warm"
        gone += what == "left 0"
    # ... and wanted again: the first start is a fork, a spare comes after it.
    with template.fork(1) as child:
        assert pid_of(child)
        template.pids(1)


def test_after_an_error(template):
    spares = template.spares(2)
    template.eval(b"fail")
    template.expect("ERROR")
    assert template.pids(2, "left 0") == spares
    with template.fork(1) as child:
        assert child.expect("ERROR")[0][4] == "fail"


@pytest.mark.parametrize("how", ["RUN", "EXEC"])
def test_the_template_becomes_something(template, how):
    spares = template.spares(2)
    stop(min(spares))
    with template.fork(1) as child, template.fork(2) as other:
        children = child, other
        if how == "RUN":
            template.run(b"dump")
        else:
            template.send("EXEC", exec_payload([b"cat", b"/dev/null"], search=b"/bin"))
        os.kill(min(spares), signal.SIGCONT)
        if how == "RUN":
            template.expect("RUNNING")
            assert b"fd " not in template.rest()
        else:
            assert template.report() is None
        for each in children:
            each.sock.shutdown(1)


def test_malformed(template):
    template.send("SPARES", b"123")
    assert template.report()[1:3] == ("protocol", errno.EPROTO)
    assert template.end()[0] == 100


def test_a_spare_has_none_itself(template):
    template.spares(1)
    with template.fork(1) as child, child.fork(2) as grandchild:
        assert pid_of(child)
        assert pid_of(grandchild)
    log = template.end()[2]
    assert log.count("warm") <= 1  # the refill of the template's own


def test_adapting(ffi, lib):
    p = ffi.new("struct afork_spares *")
    lib.afork_spares_init(p)
    p.most = p.target = 8
    seen = []
    for peak in (8, 3, 3, 3, 0, 0, 0):
        p.peak = peak
        lib.afork_spares_adapt(p)
        seen.append(p.target)
    assert seen == [8, 5, 4, 3, 1, 0, 0]
