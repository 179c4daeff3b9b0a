"""SIGKILL at every state of the protocol, to the process and to its template.

The third victim, the application, is in test_faults_application.py. In each
case the one call that asked is told which process died of what, nothing is
left behind (the guard of conftest.py), and the next request works.
"""

from __future__ import annotations

import os
import signal

import pytest

import afork._ending

from .conftest import read_all
from .scripts.fault_tools import ECHO, log, stop, wait_pidfd  # noqa: F401 - fixtures


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    """How long an orphan's status is waited for, where nobody reaps orphans."""
    monkeypatch.setattr(afork._ending, "GRACE", 0.1)


BIG = "x" * (8 << 20)  # more than any socket takes at once


async def echo(f):
    return await read_all(await f.eval(ECHO).run("echo"))


class Case:
    """A process that is at some point, and the call that waits for it."""

    def __init__(self, stop):  # noqa: F811
        self.stop = stop
        self.template = afork.Fork.new_exec()
        self.keep = []

    async def child(self):
        f = self.template.fork()
        self.keep.append(f)
        return f

    async def before_started(self):
        self.template.eval(self.stop.hook("after_in_child"))
        f = await self.child()
        return await self.stop.reached(), f.run("os.getpid")

    async def started(self):
        f = await self.child()
        await f.ready()
        return f.pid, None

    async def asked(self):
        f = (await self.child()).eval(self.stop.code)
        pid = await self.stop.reached()
        return pid, f.ready()

    async def eval(self):
        f = (await self.child()).eval(self.stop.code)
        pid = await self.stop.reached()
        return pid, f.eval("pass").run("os.getpid")

    async def require(self):
        f = (await self.child()).require("fault_stops")
        return await self.stop.reached(), f.run("os.getpid")

    async def find(self):
        f = await self.child()
        asking = f.run("fault_stops.function")
        return await self.stop.reached(), asking

    async def middle_of_a_frame(self):
        f = (await self.child()).eval(self.stop.code).eval("pass", BIG)
        assert f._process.channel.queued
        return await self.stop.reached(), f.run("os.getpid")

    async def descriptors_queued(self):
        f = (await self.child()).eval(self.stop.code).send_fh(*[0] * 60)
        f.eval("pass", BIG).send_fh(0)
        return await self.stop.reached(), f.run("os.getpid")

    async def forking(self):
        f = await self.child()
        f.eval(self.stop.hook("before"))
        grandchild = f.fork()
        self.keep.append(grandchild)
        return await self.stop.reached(), grandchild.run("os.getpid")

    async def running(self):
        body = self.stop.code.strip().replace("\n", "\n    ")
        f = (await self.child()).eval(f"def worker(sock):\n    {body}")
        sock = await f.run("worker")
        return await self.stop.reached(), self.end_of(f, sock)

    async def end_of(self, f, sock):
        assert await read_all(sock) == b""
        raise afork.WorkerLost("as expected", f.pid, await self.status(f))

    async def status(self, f):
        code = await f.wait()
        return -code if code < 0 else code << 8

    async def executed(self):
        f = await self.child()
        script = f"echo $$ > {self.stop.path}; exec sleep 1000"
        sock = await f.exec("sh", "-c", script, stdin=afork.SOCKET)
        return await self.stop.reached(), self.end_of(f, sock)


STATES = [
    "before_started",
    "started",
    "asked",
    "eval",
    "require",
    "find",
    "middle_of_a_frame",
    "descriptors_queued",
    "forking",
    "running",
    "executed",
]


@pytest.fixture
def stops_on_import(stop, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "fault_stops.py").write_text(stop.code)
    monkeypatch.syspath_prepend(tmp_path)
    return stop


@pytest.mark.parametrize("victim", ["process", "template"])
@pytest.mark.parametrize("state", STATES)
def test_killed(arun, stops_on_import, state, victim):
    async def main():
        case = Case(stops_on_import)
        template = case.template
        await template.ready()
        pid, asking = await getattr(case, state)()
        if victim == "template":
            pidfd = os.pidfd_open(pid)
            template.kill()
            assert state == "forking" or wait_pidfd(pidfd)
            os.close(pidfd)
            dead = template.pid
        else:
            pidfd = os.pidfd_open(pid)
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            assert wait_pidfd(pidfd)
            os.close(pidfd)
            dead = pid
        if asking is None:  # asked only now
            asking = case.keep[0].run("os.getpid")
        with pytest.raises((afork.WorkerLost, afork.TemplateError)) as info:
            await asking
        error = info.value
        if victim == "template" and state in ("running", "executed"):
            # Older kernels do not tell how somebody else's child has ended.
            assert error.status in (9, None)
        elif victim == "template":
            assert type(error) is afork.TemplateError
            chain = [error]
            while chain[-1].__cause__ is not None:
                chain.append(chain[-1].__cause__)
            assert (chain[-1].pid, chain[-1].status) == (dead, 9)
        else:
            if state == "forking":  # it was the template of the one that asked
                assert type(error) is afork.TemplateError
            else:
                assert type(error) is afork.WorkerLost
            # Before its start is reported, its number is not known. What is found
            # at once is reported with it; a process that had to wait has said it.
            known = {"before_started": (None,), "find": (None, dead)}
            assert error.pid in known.get(state, (dead,))
            assert error.status == 9
        if victim == "process":
            # The template has not suffered, nor have its other children.
            template.eval("globals().get('_armed', []).clear()")
            assert await echo(template.fork()) == b"()"
            template.close()
            assert await template.wait() == 0
        else:
            assert await template.wait() == -9
        assert await echo(afork.Fork.new()) == b"()"

    arun(main)


@pytest.mark.parametrize("victim", ["program", "template"])
def test_killed_after_spawn(arun, stop, log, victim):  # noqa: F811
    async def main():
        script = f"echo $$ > {stop.path}; exec sleep 1000"
        p = await afork.create_subprocess_exec("sh", "-c", script, stdout=-1)
        assert await stop.reached() == p.pid
        template = afork.Fork.default()
        await template.ready()
        os.kill(p.pid if victim == "program" else template.pid, signal.SIGKILL)
        assert await p.stdout.read() == b""
        code = await p.wait()
        if victim == "program":
            assert code == -9
            assert afork.Fork.default().pid == template.pid
        else:
            assert code in (-9, 255)
            assert await template.wait() == -9
        p = await afork.create_subprocess_exec("sh", "-c", "exit 3")
        assert await p.wait() == 3

    arun(main)
    log.lines[:] = [line for line in log.lines if "is unknown" not in line]


@pytest.mark.parametrize("victim", ["process", "template"])
def test_killed_while_nobody_awaits(arun, stop, log, victim):  # noqa: F811
    """Configured and forgotten: the log is told, once."""

    async def main():
        template = afork.Fork.new_exec()
        await template.ready()
        f = template.fork().eval(stop.code)
        process = f._process
        f.run("os.getpid")
        del f
        pid = await stop.reached()
        os.kill(pid if victim == "process" else template.pid, signal.SIGKILL)
        await process.until(lambda: process.was_logged)
        if victim == "process":
            template.close()
            assert await template.wait() == 0
        else:
            assert await template.wait() == -9

    arun(main)
    assert len(log.lines) == 1
    assert "SIGKILL" in log.lines[0]
    log.lines.clear()
