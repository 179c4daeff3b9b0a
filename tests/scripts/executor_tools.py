"""What tests of executors share: events of their calls, and how things end."""

from __future__ import annotations

import importlib
import os
import queue

import pytest

from ..conftest import HANG
from .fault_tools import wait_pidfd


class Events:
    """Events of calls, to be waited for in a thread."""

    def __init__(self):
        self.queue = queue.SimpleQueue()

    def __call__(self, event):
        self.queue.put(event.args)

    def held(self, n=1):
        """Wait for n calls to be at the gate; their processes and values."""
        found = [self.queue.get(timeout=HANG) for _ in range(n)]
        assert all(args[0] == "held" for args in found)
        return [args[1:] for args in found]


@pytest.fixture
def events():
    return Events()


@pytest.fixture
def more_jobs(jobs):
    return importlib.import_module("executor_jobs")


def ends(pid):
    """Whether a process that may have ended ends."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return wait_pidfd(fd)
    finally:
        os.close(fd)


def joined(thread):
    thread.join(HANG)
    return not thread.is_alive()


def results(fs):
    return [f.result(HANG) for f in fs]
