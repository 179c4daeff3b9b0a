"""The template dies: whoever waits is told, whoever comes next gets a new one."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

import afork._ending

from .conftest import read_all
from .scripts.fault_tools import ECHO, log, stop, suspend  # noqa: F401 - fixtures

GOOD = b"()"


async def echo(f=None):
    f = f or afork.Fork.new()
    return await read_all(await f.eval(ECHO).run("echo"))


def kill_and_see_it_dead(pid):
    os.kill(pid, signal.SIGKILL)
    # Its sockets are closed by then; it stays a zombie for whose it is.
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


async def outcomes(awaitables):
    """Sorted out: how many were answered, and the errors of the others."""
    good, errors = 0, []
    for result in await asyncio.gather(*awaitables, return_exceptions=True):
        if isinstance(result, BaseException):
            errors.append(result)
        else:
            good += 1
            if result is not None and not isinstance(result, int):
                result.close()
    return good, errors


@pytest.mark.parametrize("queued", [0, 1, 100])
def test_default_killed_with_requests_that_it_has_not_read(arun, queued):
    async def main():
        template = afork.Fork.default()
        await template.ready()
        suspend(template.pid)
        forks = [afork.Fork.new() for _ in range(queued)]
        runs = [f.run("os.getpid") for f in forks]
        kill_and_see_it_dead(template.pid)
        good, errors = await outcomes(runs)
        assert good == 0
        assert len(errors) == queued
        for error in errors:
            assert type(error) is afork.TemplateError
            assert (error.pid, error.status) == (template.pid, 9)
        assert len(set(map(id, errors))) == queued
        assert await echo() == GOOD
        assert afork.Fork.default().pid != template.pid
        assert await template.wait() == -9

    arun(main)


def test_requests_that_were_not_sent_move_to_the_next_one(arun):
    async def main():
        template = afork.Fork.default()
        await template.ready()
        suspend(template.pid)
        # More than fit into its socket.
        template.eval("pass", "x" * (4 << 20))
        forks = [afork.Fork.new().eval("def f(sock): pass") for _ in range(100)]
        runs = [f.run("f") for f in forks]
        os.kill(template.pid, signal.SIGKILL)
        assert await outcomes(runs) == (100, [])
        with pytest.raises(afork.TemplateError):
            await template.ready()
        for f in forks:
            assert await f.wait() == 0

    arun(main)


def test_some_sent_and_some_not(arun):
    async def main():
        template = afork.Fork.default()
        await template.ready()
        suspend(template.pid)
        forks = [afork.Fork.new() for _ in range(600)]
        runs = [f.eval(ECHO).run("echo") for f in forks]
        os.kill(template.pid, signal.SIGKILL)
        good, errors = await outcomes(runs)
        assert good + len(errors) == 600
        assert good > 0
        assert errors
        assert {type(e) for e in errors} == {afork.TemplateError}

    arun(main)


def test_default_killed_before_it_has_started(arun):
    async def main():
        f = afork.Fork.new()
        template = afork.Fork.default()
        template.kill()
        with pytest.raises(afork.TemplateError) as info:
            await f.run("os.getpid")
        assert info.value.status == 9
        assert await echo() == GOOD

    arun(main)


def test_default_killed_between_requests_is_no_error(arun, log):  # noqa: F811
    async def main():
        assert await echo() == GOOD
        pids = set()
        for _ in range(3):
            template = afork.Fork.default()
            await template.ready()
            pids.add(template.pid)
            kill_and_see_it_dead(template.pid)
            # Nobody has had the time to notice.
            assert await echo() == GOOD
        assert len(pids) == 3
        template = afork.Fork.default()
        await template.ready()
        kill_and_see_it_dead(template.pid)
        p = await afork.create_subprocess_exec("sh", "-c", "exit 7")
        assert await p.wait() == 7

    arun(main)
    # Nobody was told otherwise.
    assert len(log.lines) == len(set(log.lines)) == 4
    log.lines.clear()


def test_default_killed_between_two_loops(arun, log):  # noqa: F811
    async def first():
        assert await echo() == GOOD
        template = afork.Fork.default()
        await template.ready()
        return template.pid

    pid = arun(first)
    kill_and_see_it_dead(pid)
    assert arun(first) != pid
    assert len(log.lines) <= 1
    log.lines.clear()


def test_what_was_due_in_a_loop_that_has_been_closed(arun):
    kept = []

    async def first():
        template = afork.Fork.new_exec()
        f = template.fork()
        await f.ready()
        suspend(template.pid)  # so that it cannot tell how the other ends
        f.kill()
        await f._process.until(lambda: f._process.gone)
        kept.extend([template, f])

    async def second():
        template, f = kept
        with pytest.raises(afork.WorkerLost):
            await f.ready()
        os.kill(template.pid, signal.SIGCONT)
        template.close()
        assert await template.wait() == 0
        kept.clear()

    arun(first)
    arun(second)


@pytest.mark.parametrize("running", [0, 100])
def test_programs_asked_of_a_default_that_dies(arun, running):
    async def main():
        template = afork.Fork.default()
        await template.ready()
        suspend(template.pid)
        asked = [
            asyncio.ensure_future(afork.create_subprocess_exec("true", stdout=-1))
            for _ in range(running + 1)
        ]
        await asyncio.sleep(0)
        os.kill(template.pid, signal.SIGKILL)
        good, errors = await outcomes(asked)
        assert good == 0
        assert {type(e) for e in errors} == {afork.TemplateError}
        assert {e.status for e in errors} == {9}
        p = await afork.create_subprocess_exec("true")
        assert await p.wait() == 0

    arun(main)


@pytest.mark.parametrize("queued", [0, 100])
def test_custom_template_killed(arun, queued):
    async def main():
        template = afork.Fork.new_exec()
        await template.ready()
        suspend(template.pid)
        forks = template.fork_many(queued)
        grandchildren = [f.fork() for f in forks[:3]]
        runs = [f.run("os.getpid") for f in (*forks[3:], *grandchildren)]
        os.kill(template.pid, signal.SIGKILL)
        good, errors = await outcomes(runs)
        assert good == 0
        assert {type(e) for e in errors} <= {afork.TemplateError}
        with pytest.raises(afork.TemplateError) as info:
            await template.ready()
        assert (info.value.pid, info.value.status) == (template.pid, 9)
        assert await template.wait() == -9
        # It stays dead: nobody else can be what it was.
        with pytest.raises(afork.TemplateError):
            await template.fork().run("os.getpid")
        with pytest.raises(afork.TemplateError):
            await template.fork_many(2)[1].exec("true")
        with pytest.raises(afork.TemplateError):
            await template.eval("pass").send_arg("x").send_fh(0).run("os.getpid")
        assert await echo() == GOOD

    arun(main)


def test_killed_with_sockets_to_come(arun):
    """None of many has its socket yet, nor have those forked from them."""

    async def main():
        template = afork.Fork.new_exec()
        await template.ready()
        suspend(template.pid)
        forks = template.fork_many(20)
        inner = [p for f in forks[:5] for p in (*f.fork_many(2), f.fork())]
        closed = forks.pop()
        closed.close()
        runs = [f.run("os.getpid") for f in (*forks[5:], *inner)]
        os.kill(template.pid, signal.SIGKILL)
        good, errors = await outcomes(runs)
        assert good == 0
        assert {type(e) for e in errors} <= {afork.TemplateError, afork.WorkerLost}
        for f in forks[:5]:
            with pytest.raises(afork.TemplateError):
                await f.ready()
        with pytest.raises(afork.WorkerLost):
            await closed.wait()

    arun(main)


def test_many_that_were_not_sent_move_to_the_next_template(arun, log):  # noqa: F811
    async def main():
        default = afork.Fork.default()
        await default.ready()
        pid = default.pid
        suspend(pid)
        default.eval("x = 1", "x" * (8 << 20))  # the socket is full
        forks = default.fork_many(10)
        forks.pop(0).close()
        os.kill(pid, signal.SIGKILL)
        socks = await asyncio.gather(*(f.eval(ECHO).run("echo") for f in forks))
        assert [await read_all(s) for s in socks] == [b"()"] * 9
        assert afork.Fork.default().pid != pid
        del default
        log.lines.clear()  # what was configured on the old one

    arun(main)


def test_in_the_middle_of_a_frame(arun):
    async def main():
        template = afork.Fork.new_exec()
        await template.ready()
        suspend(template.pid)
        template.eval("pass", "x" * (8 << 20))
        assert template._process.channel.queued
        child = template.fork()
        os.kill(template.pid, signal.SIGKILL)
        with pytest.raises(afork.TemplateError):
            await child.run("os.getpid")
        with pytest.raises(afork.TemplateError):
            await template.ready()

    arun(main)


def test_workers_die_with_their_template_and_detached_ones_do_not(arun, monkeypatch):
    monkeypatch.setattr(afork._ending, "GRACE", 0.1)

    async def main():
        template = afork.Fork.default()
        f = afork.Fork.new().eval("def f(sock): sock.recv(1)")
        g = afork.Fork.new().set(detach=True).eval("def f(sock): sock.recv(1)")
        sock, other = await f.run("f"), await g.run("f")
        template.kill()
        assert await template.wait() == -9
        assert await read_all(sock) == b""
        try:
            assert await f.wait() == -9
        except afork.WorkerLost as exc:  # older kernels keep it to themselves
            assert exc.status is None  # noqa: PT017
        assert g.returncode is None
        other.send(b"x")
        assert await read_all(other) == b""
        try:
            assert await g.wait() == 0
        except afork.WorkerLost as exc:
            assert exc.status is None  # noqa: PT017

    arun(main)


def test_cancelled_while_the_template_does_not_answer(arun):
    async def main():
        template = afork.Fork.default()
        await template.ready()
        suspend(template.pid)
        f = afork.Fork.new().eval("import signal\ndef f(sock): signal.pause()")
        tasks = [
            asyncio.ensure_future(f.run("f")),
            asyncio.ensure_future(afork.create_subprocess_exec("sleep", "1000")),
            asyncio.ensure_future(afork.Fork.new().ready()),
        ]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(x) for x in done] == [asyncio.CancelledError] * 3
        os.kill(template.pid, signal.SIGCONT)
        # The signal waits for the process.
        assert await f.wait() == -9
        assert await echo() == GOOD
        assert afork.Fork.default().pid == template.pid

    arun(main)


def test_a_template_that_nobody_asks_is_told_to_the_log_once(arun, log):  # noqa: F811
    async def main():
        template = afork.Fork.new_exec()
        await template.ready()
        os.kill(template.pid, signal.SIGKILL)
        process = template._process
        await process.until(lambda: process.error is not None)

    arun(main)
    assert len(log.lines) == 1
    assert "SIGKILL" in log.lines[0]
    log.lines.clear()


def test_signals_to_a_busy_template(arun, stop):  # noqa: F811
    """Ctrl-C and the stop of a container, while it executes code."""

    async def main():
        template = afork.Fork.default()
        template.eval(
            f"import os\nfd = os.open({stop.path!r}, os.O_WRONLY)\n"
            "os.write(fd, b'%d' % os.getpid())\nos.close(fd)\n"
            "end, start = os.pipe()[::-1], 0\n"
            "import select, time\n"
            "until = time.monotonic() + 0.05\n"
            "while time.monotonic() < until: pass\n"
        )
        pid = await stop.reached()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            os.kill(pid, number)
        await template.ready()
        assert await echo() == GOOD
        assert afork.Fork.default().pid == pid

    arun(main)
