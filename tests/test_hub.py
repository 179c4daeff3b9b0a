"""The hub: its lock, who is called without it, and what it waits for."""

from __future__ import annotations

import asyncio
import errno
import logging
import threading

import pytest

import afork
from afork import _afork
from afork._hub import hub

from .conftest import HANG


def is_free(lock) -> bool:
    """Whether another thread could take it."""
    found = []

    def take():
        found.append(lock.acquire(False))
        if found[0]:
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join(HANG)
    return found == [True]


def test_lock():
    lock = _afork.Lock()
    assert lock.acquire()
    with lock:
        assert not is_free(lock)
    assert not is_free(lock)
    lock.release()
    assert is_free(lock)
    with pytest.raises(RuntimeError):
        lock.release()
    lock.acquire()
    told = []
    thread = threading.Thread(target=lambda: told.append(lock.acquire(True)))
    thread.start()
    lock.release()
    thread.join(HANG)
    assert told == [True]
    with pytest.raises(RuntimeError):  # it is the other thread's
        lock.release()


def test_what_is_called_without_the_lock():
    lock, calls = _afork.Lock(), []

    def call():
        assert is_free(lock)
        calls.append(len(calls))
        if len(calls) == 1:
            lock.after(call)  # at once

    lock.after(call)
    assert calls == [0, 1]
    with lock:
        with lock:
            lock.after(call)
            lock.after(call)
        assert calls == [0, 1]
    assert calls == [0, 1, 2, 3]


def test_what_is_called_without_the_lock_and_raises(monkeypatch):
    unraisable, calls, lock = [], [], _afork.Lock()
    monkeypatch.setattr("sys.unraisablehook", lambda told: unraisable.append(told))

    def enter():
        with lock:
            lock.after(lambda: 1 / 0)
            lock.after(lambda: [][0])
            lock.after(lambda: calls.append(1))

    with pytest.raises(ZeroDivisionError):
        enter()
    assert calls == [1]
    assert [told.exc_type for told in unraisable] == [IndexError]
    assert is_free(lock)


def test_logging_handlers_run_without_the_lock(arun):
    """They may wait for another thread, and that for us."""

    async def main():
        loop, told = asyncio.get_running_loop(), asyncio.Event()
        free = []

        class Handler(logging.Handler):
            def emit(self, record):
                free.append((record.getMessage(), is_free(hub().lock)))
                loop.call_soon(told.set)

        handler = Handler()
        logging.getLogger("afork").addHandler(handler)
        try:
            afork.Fork.new().run("no.such.function")
            await told.wait()
            told.clear()
            afork.Fork.new().eval("1 / 0")  # dropped
            await told.wait()
        finally:
            logging.getLogger("afork").removeHandler(handler)
        assert [lock for _, lock in free] == [True, True], free
        assert "named 'no'" in free[0][0]
        assert "division by zero" in free[1][0]

    arun(main)


def test_callbacks_run_without_the_lock_and_without_a_loop():
    free = []
    f = afork.Fork.new().eval("def hold(sock): sock.recv(1)")

    def callback(sock):
        sock.close()
        free.append(is_free(hub().lock))

    run = f.run("hold", callback)
    while not free:
        hub().wait(HANG)
    assert free == [True]
    del run


def test_waits_for_any_descriptor(run_script):
    """select(2) takes none above 1023."""
    run_script(
        """
import os, resource
from afork._hub import hub

soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2048), hard))
fds = [os.dup(0)]
while fds[-1] < 1024:
    fds.append(os.dup(0))
assert hub().fileno() > 1023
hub().wait(0)
"""
    )


class Crowded:
    """A channel once its user has too many descriptors in flight."""

    queued = 1
    crowded = True

    def __init__(self, channel):
        self.channel = channel
        self.tries = 0

    def flush(self):
        self.tries += 1
        return False

    def __getattr__(self, name):
        return getattr(self.channel, name)


def test_too_many_descriptors_in_flight(arun):
    """The socket has room all the time: waiting for that would be busy."""

    async def main():
        f = await afork.Fork.new().ready()
        process = f._process
        crowded = process.channel = Crowded(process.channel)
        process.flush()
        for _ in range(500):
            await asyncio.sleep(0)
        assert crowded.tries < 250
        while crowded.tries < 5:  # not given up
            await asyncio.sleep(0)
        process.channel = crowded.channel
        await f.eval("pass").ready()
        f.close()
        assert await f.wait() == 0

    arun(main)


@pytest.mark.parametrize("number", [-1, 65, 1 << 40])
def test_a_signal_that_there_is_not(arun, number):
    """Refused at the call: queued, it would come up at the start."""

    async def main():
        f = afork.Fork.new()
        with pytest.raises(OSError, match="Invalid argument") as info:
            f.send_signal(number)
        assert info.value.errno == errno.EINVAL
        f.send_signal(0)
        await f.ready()
        f.close()
        assert await f.wait() == 0

    arun(main)
