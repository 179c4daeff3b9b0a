"""The application dies: nothing that it has started survives (promise P4)."""

from __future__ import annotations

import contextlib
import os
import select
import signal

import pytest

from .scripts.fault_tools import (  # noqa: F401 - fixtures
    HANG,
    StopPoint,
    children_of,
    log,
    start_script,
    stop,
    subreaper,
    wait_pidfd,
)

STATES = {
    # state: how many processes get to the stop-point by themselves
    "started": 0,
    "thread": 0,
    "eval": 1,
    "template-eval": 1,
    "template-loop": 1,
    "require": 1,
    "mid-frame": 1,
    "before-fork": 1,
    "after-fork": 1,
    "running": 2,
    "deaf": 0,
    "exec": 1,
    "spawn": 1,
    "tree": 1,
    "detached": 1,
}


def reached(stop):  # noqa: F811
    assert select.select([stop.fd], [], [], HANG)[0], "the stop-point was not reached"
    return [int(x) for x in os.read(stop.fd, 100).split()]


def everybody(pid):
    """All descendants of a process."""
    found = []
    for child in children_of(pid):
        found += [child, *everybody(child)]
    return found


@pytest.mark.parametrize("state", STATES)
def test_killed_with_everything_alive(stop, state, tmp_path):  # noqa: F811
    modules = tmp_path / "stop.modules"
    modules.mkdir()
    (modules / "fault_stops.py").write_text(stop.code)
    with subreaper(), contextlib.ExitStack() as stack:
        app = start_script("fault_application.py", state, stop.path)
        stack.callback(app.wait)
        stack.callback(app.stdout.close)
        stack.callback(app.kill)
        told = [int(x) for x in app.stdout.readline().split()]
        assert told
        stopped = []
        while len(stopped) < STATES[state]:
            stopped += reached(stop)
        detached = {-pid for pid in told if pid < 0}
        alive = {*everybody(app.pid), *stopped, *map(abs, told)}
        pidfds = {}
        for pid in alive:
            pidfds[pid] = os.pidfd_open(pid)
            stack.callback(os.close, pidfds[pid])
        app.kill()
        for pid in alive - detached:
            assert wait_pidfd(pidfds[pid]), f"{pid} of {alive} survives"
        for pid in detached:
            assert not select.select([pidfds[pid]], [], [], 0)[0]
            signal.pidfd_send_signal(pidfds[pid], signal.SIGKILL)
            assert wait_pidfd(pidfds[pid])


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_stopped_with_everything_alive(stop, number):  # noqa: F811
    """Also the ways in which it has time to clean up."""
    with subreaper(), contextlib.ExitStack() as stack:
        app = start_script("fault_application.py", "running", stop.path, stderr=-3)
        stack.callback(app.wait)
        stack.callback(app.stdout.close)
        stack.callback(app.kill)
        pids = [int(x) for x in app.stdout.readline().split()]
        alive = {*everybody(app.pid), *pids}
        pidfds = []
        for pid in alive:
            pidfds.append(os.pidfd_open(pid))
            stack.callback(os.close, pidfds[-1])
        app.send_signal(getattr(signal, number))
        for pidfd in pidfds:
            assert wait_pidfd(pidfd)


def test_the_end_of_the_script_is_the_end_of_its_processes(run_script, tmp_path):
    """With objects alive in every state, and no word of complaint."""
    done = run_script(
        """
import asyncio, afork, sys
keep = []
async def main():
    f = afork.Fork.new_exec().require("os")
    keep.extend([f, f.fork(), f.fork().eval("import time; time.sleep(1000)")])
    g = afork.Fork.new().eval("def w(sock): sock.recv(1)")
    sock = await g.run("w")
    keep.append(g)
    sock.close()
    keep.append(afork.Fork.new().eval("1 / 0"))
    await keep[0].ready()
    print(f.pid)
asyncio.run(main())
""",
        flags=("-W", "error"),  # not -X dev: it complains of slow machines
        cwd=tmp_path,
    )
    assert done.stderr == ""
    pid = int(done.stdout)
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        with contextlib.closing(os.fdopen(pidfd, "rb", 0)):
            assert wait_pidfd(pidfd)
