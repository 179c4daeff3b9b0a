"""What an application does with an event: Poller, and Channel.deliver."""

from __future__ import annotations

import array
import contextlib
import gc
import os
import socket
import threading

import pytest

from afork import _afork
from afork._reports import EXITED, STARTED

RUNNING = b"r\0\0\0\0"


class Told:
    """In the place of a process: what it was told."""

    def __init__(self):
        self.children = {}
        self.calls = []

    def _on_entered(self, pid, pidfd):
        self.calls.append(("entered", pid, pidfd))

    def _on_reports(self, reports):
        self.calls.append(reports)

    def _on_event(self, events):
        self.calls.append(("event", events))


def frame(letter: bytes, payload: bytes = b"") -> bytes:
    return letter + len(payload).to_bytes(4, "little") + payload


def exited(id: int) -> bytes:
    return frame(b"x", EXITED.pack(id, 7, 0, *range(18)))


STARTED_7 = frame(b"p", STARTED.pack(7))
BARE_7 = frame(b"n", STARTED.pack(7))


@pytest.fixture
def ends():
    """A template's channel and one forked from it, each with its other end."""
    with contextlib.ExitStack() as stack:
        ours, template = socket.socketpair()
        stack.enter_context(template)
        parent = _afork.Channel(ours.detach())
        stack.callback(parent.close)
        child = parent.fork(1)
        stack.callback(child.close)
        assert parent.flush()
        data, control, _, _ = template.recvmsg(100, 100)
        assert data[:1] == b"F"
        process = socket.socket(fileno=array.array("i", control[0][2])[0])
        stack.enter_context(process)
        yield parent, template, child, process


@pytest.fixture
def poller():
    made = _afork.Poller()
    yield made
    made.close()


def send(sock, data, fd=None):
    with open(os.devnull) as file:
        socket.send_fds(sock, [data], [file.fileno()] if fd else [])


@pytest.mark.parametrize("at_once", [True, False])
def test_started_and_running_are_one_call(ends, at_once):
    _, _, child, process = ends
    told = Told()
    if at_once:
        send(process, STARTED_7 + RUNNING + b"user", fd=True)
    else:
        send(process, STARTED_7, fd=True)
        send(process, RUNNING)
        send(process, b"user")
    child.deliver(told)
    ((what, pid, pidfd),) = told.calls
    os.close(pidfd.detach())
    assert (what, pid) == ("entered", 7)
    with socket.socket(fileno=child.detach()) as sock:
        assert sock.recv(10) == b"user"


def test_started_without_a_descriptor(ends):
    _, _, child, process = ends
    told = Told()
    send(process, BARE_7 + RUNNING)
    child.deliver(told)
    assert told.calls == [("entered", 7, None)]


@pytest.mark.parametrize("more", [RUNNING, frame(b"d", b"12345678")])
def test_a_descriptor_that_nobody_took_is_closed(ends, more):
    """Whatever is raised on the way, and wherever."""
    _, _, child, process = ends

    class Raising:
        children = None

        def _on_entered(self, pid, pidfd):
            raise MemoryError

        _on_reports = None

    before = len(os.listdir("/proc/self/fd"))
    send(process, STARTED_7 + more, fd=True)
    with pytest.raises((MemoryError, TypeError)):
        child.deliver(Raising())
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_descriptor_has_one_owner(ends):
    _, _, child, process = ends
    told = Told()
    send(process, STARTED_7 + RUNNING, fd=True)
    child.deliver(told)
    ((_, _, pidfd),) = told.calls
    number = pidfd.fileno()
    assert pidfd.detach() == number
    for gone in (pidfd.detach, pidfd.fileno):
        with pytest.raises(OSError, match="Bad file descriptor"):
            gone()
    del pidfd
    told.calls.clear()
    os.close(number)  # it was not closed
    with pytest.raises(TypeError):
        _afork.Descriptor()


def test_one_after_the_other_are_lists(ends):
    _, _, child, process = ends
    told = Told()
    send(process, BARE_7)
    child.deliver(told)
    send(process, RUNNING + b"user")
    child.deliver(told)
    assert told.calls == [
        [(ord("n"), STARTED.pack(7), None)],
        [(ord("r"), b"", None)],
    ]
    with socket.socket(fileno=child.detach()) as sock:
        assert sock.recv(10) == b"user"


def test_end_of_file_is_told_with_what_came_before(ends):
    _, _, child, process = ends
    told = Told()
    send(process, BARE_7 + frame(b"d", b"12345678"))
    process.close()
    child.deliver(told)
    child.deliver(told)
    assert told.calls == [
        [(ord("n"), STARTED.pack(7), None), (ord("d"), b"12345678", None)],
        [],
    ]
    assert child.eof


def test_running_before_anything_else_is_refused(ends):
    _, _, child, process = ends
    told = Told()
    send(process, RUNNING + b"user bytes")
    child.deliver(told)
    ((letter, _, status),) = told.calls[0]
    assert letter == 0
    assert status < 0
    assert child.eof


def test_ends_of_children_that_nobody_has_are_left_out(ends):
    parent, template, _, _ = ends
    told = Told()
    told.children[5] = object()
    for id in (4, 5, 6):
        send(template, exited(id))
    send(template, frame(b"d", b"12345678"))
    parent.deliver(told)
    assert [(letter, data[:1]) for letter, data, _ in told.calls[0]] == [
        (ord("x"), b"\5"),
        (ord("d"), b"1"),
    ]
    # More than are read ahead, and than one call takes.
    send(template, exited(4) * 300 + exited(5))
    for _ in range(10):
        parent.deliver(told)
    assert sum(len(reports) for reports in told.calls[1:]) == 1


def test_events_reach_their_callbacks(poller):
    a, b = socket.socketpair()
    with a, b:
        calls = []
        poller.watch(a.fileno(), calls.append)
        poller.drain()
        assert calls == []
        b.send(b"x")
        poller.drain()
        poller.drain()  # it is still there
        assert calls == [1, 1]
        poller.change(a.fileno(), 4)
        poller.drain()
        assert calls == [1, 1, 4]
        poller.unwatch(a.fileno())
        poller.unwatch(a.fileno())  # it is no error
        poller.unwatch(-1)
        poller.unwatch(1 << 20)
        poller.drain()
        assert calls == [1, 1, 4]
    with pytest.raises(OSError, match="Bad file descriptor"):
        poller.watch(-1, print)
    with pytest.raises(OSError, match="Bad file descriptor"):
        poller.watch(1 << 20, print)
    assert poller.owners() == []


def test_process_and_channel(poller, ends):
    _, _, child, process = ends
    told = Told()
    poller.watch_process(child, told)
    assert poller.owners() == [told]
    poller.change(child.fileno(), 1 | 4)
    poller.drain()
    assert told.calls.pop() == ("event", 4)
    poller.change(child.fileno(), 1)
    send(process, BARE_7)
    poller.drain()
    assert told.calls == [[(ord("n"), STARTED.pack(7), None)]]
    poller.unwatch(child.fileno())
    for wrong in [(), (child,), (told, child), (child, told, told)]:
        with pytest.raises(TypeError):
            poller.watch_process(*wrong)


def test_an_exception_is_the_loops_and_the_lock_is_free(poller):
    a, b = socket.socketpair()
    with a, b:
        b.send(b"x")
        poller.watch(a.fileno(), lambda events: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            poller.drain()
        free = []
        thread = threading.Thread(
            target=lambda: free.append(poller.lock.acquire(False))
        )
        thread.start()
        thread.join(10)
        assert free == [True]


def test_what_an_earlier_event_closes_is_not_called(poller):
    pairs = [socket.socketpair() for _ in range(5)]
    calls = []

    def close_all(events):
        """The first one closes all, and their numbers are taken anew."""
        calls.append(events)
        for a, b in pairs:
            poller.unwatch(a.fileno())
            a.close()
            b.close()
        for a, b in [socket.socketpair() for _ in pairs]:
            again.extend((a, b))
            b.send(b"x")
            poller.watch(a.fileno(), later.append)

    again: list[socket.socket] = []
    later: list[int] = []
    for a, b in pairs:
        b.send(b"x")
        poller.watch(a.fileno(), close_all)
    poller.drain()
    assert calls == [1]
    assert later == []
    poller.drain()
    assert later == [1] * 5
    for sock in again:
        sock.close()


@pytest.fixture
def ahead():
    """A channel that reads ahead, and its other end."""
    ours, theirs = socket.socketpair()
    channel = _afork.Channel(ours.detach())
    child = channel.fork(1)
    with theirs:
        yield channel, theirs
    child.close()
    channel.close()


def test_one_that_sends_on_and_on_is_left_in_between(ahead):
    """Although half a frame is left of nearly every read."""
    channel, theirs = ahead
    theirs.setblocking(False)
    n = 5000
    sent = theirs.send(b"".join(frame(b"d", i.to_bytes(8, "little")) for i in range(n)))
    n = sent // 13
    assert n > 3000
    got, first = [], len(found := channel.receive())
    while found:
        got += [int.from_bytes(payload, "little") for _, payload, _ in found]
        found = channel.receive()
    assert got == list(range(n))
    assert first < 1500


def test_garbage_that_receives_as_well(ahead):
    """Up to 3.11 it may be collected while a report is made."""
    channel, theirs = ahead
    nested = []

    class Garbage:
        def __init__(self):
            self.me = self

        def __del__(self):
            nested.extend(channel.receive())

    lengths = [8 if i % 2 else 4096 for i in range(40)]
    for i, length in enumerate(lengths):
        theirs.sendall(frame(b"d", i.to_bytes(8, "little") * (length // 8)))
    before = gc.get_threshold()
    Garbage()
    gc.set_threshold(5, 1000, 1000)
    try:
        found = channel.receive()
    finally:
        gc.set_threshold(*before)
    gc.collect()
    found += nested
    assert [int.from_bytes(p[:8], "little") for _, p, _ in found] == list(range(40))
    assert [len(p) for _, p, _ in found] == lengths
