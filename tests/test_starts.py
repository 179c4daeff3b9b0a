"""What becomes of a start that nobody has a hold on any more, and quiet templates."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import socket
import struct
import subprocess

import pytest

import afork
from afork import _afork
from afork._hub import hub
from afork._process import Process
from afork._reports import EXITED

from .conftest import read_all


async def until(happened):
    async with asyncio.timeout(10):
        while not happened():
            await asyncio.sleep(0.005)


def test_a_template_forgets_workers_that_nobody_can_ask_about(arun):
    async def main():
        template = afork.Fork.new().eval("def wait(sock): sock.recv(1)")
        await template.ready()
        kept = template.fork()
        sock = await kept.run("wait")
        children = template._process.children
        for _ in range(100):  # many times what may wait to be read
            assert await read_all(await template.fork().run("builtins.id")) == b""
            assert len(children) <= 2
        assert list(children.values()) == [kept._process]
        sock.close()
        assert await kept.wait() == 0
        # Configured and forgotten: the same, as soon as it runs.
        template.fork().run("builtins.id")
        await until(lambda: not children)
        # And the other way round: first it runs, then it is dropped.
        f = template.fork()
        (await f.run("builtins.id")).close()
        del f
        assert not children

    arun(main)


def test_one_that_is_waited_for_is_not_forgotten(arun):
    async def main():
        template = afork.Fork.new()
        await template.ready()
        f = template.fork()
        waiting = asyncio.ensure_future(f.wait())
        await asyncio.sleep(0)
        sock = await f.run("builtins.id")
        del f
        assert await read_all(sock) == b""
        assert await waiting == 0

    arun(main)


def test_cancelled_between_running_and_taking(arun):
    """The await is cancelled when the function runs, and its Fork is dropped."""

    async def main():
        template = afork.Fork.new().eval(
            "import signal\ndef wait(sock, fd):\n    signal.pause()"
        )
        await template.ready()
        r, w = os.pipe()
        f = template.fork().send_fh(w)
        os.close(w)
        process = f._process
        run = asyncio.ensure_future(f.run("wait"))
        del f
        await asyncio.sleep(0)

        def running():
            process.poll()
            return process.running

        while not running():  # without the loop: the task must not get further
            pass
        assert process.dropped
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        gc.collect()
        assert await asyncio.to_thread(os.read, r, 1) == b""  # it was killed
        os.close(r)

    arun(main)


def test_what_a_quiet_template_knows_is_asked_for(arun):
    async def main():
        template = afork.Fork.new()
        await template.ready()
        forks = [template.fork() for _ in range(3)]
        assert template._process.quiet
        for f in forks:
            assert await read_all(await f.run("builtins.id")) == b""
        await until(lambda: forks[0].returncode == 0)
        await until(lambda: forks[1].rusage is not None)
        await until(lambda: "exited 0" in repr(forks[2]))
        with pytest.raises(ProcessLookupError):
            forks[0].send_signal(signal.SIGTERM)

    arun(main)


def test_the_end_of_a_quiet_template_is_noticed(arun):
    async def main():
        template = afork.Fork.new()
        await template.ready()
        f = template.fork()
        await f.ready()
        template.kill()
        assert await template.wait() == -signal.SIGKILL
        with pytest.raises((afork.TemplateError, afork.WorkerLost)):
            await f.run("builtins.id")

    arun(main)


def test_an_error_of_a_quiet_template_is_logged(arun, caplog):
    async def main():
        template = afork.Fork.new()
        await template.ready()
        await template.fork().ready()
        template.eval("1/0")
        del template
        await until(lambda: "ZeroDivisionError" in caplog.text)

    arun(main)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_waits_for_a_descriptor(arun, number):
    """Its pidfd was lost when none was left, and cannot be made anew either."""

    async def main():
        template = afork.Fork.new().eval("import signal")
        await template.ready()
        f = template.fork().eval("def wait(sock): signal.pause()")
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            sock = await f.run("wait")
            assert f._process.pidfd < 0
            f.send_signal(number)
            f.send_signal(number)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert await f.wait() == -number
        sock.close()

    arun(main)


def test_a_signal_without_a_descriptor_or_a_loop():
    """There is nobody to try it again."""

    async def begin():
        f = afork.Fork.new().eval("import signal")
        await f.ready()
        f = f.fork().eval("def wait(sock): signal.pause()")
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        return f, await f.run("wait")

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with asyncio.Runner() as runner:
        try:
            f, sock = runner.run(begin())
            with pytest.raises(OSError, match="Too many open files"):
                f.kill()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        f.kill()
        assert runner.run(asyncio.wait_for(f.wait(), 10)) == -signal.SIGKILL
        sock.close()


def test_reports_are_handled_in_their_order(arun):
    """Although a report makes its process look for more."""

    async def main():
        hub().attach()
        ours, theirs = socket.socketpair()
        template = Process(_afork.Channel(ours.detach()))
        template.watch()
        template.pid = os.getpid()
        template.quiet = template.forked = template.released = True
        children = [Process(None, id, template) for id in (1, 2)]
        for child in children:
            child.names = ("x",) * 5
            template.children[child.id] = child
        children[0].signals = (signal.SIGTERM,)  # for when its number is known
        with subprocess.Popen(["sleep", "60"]) as program:
            pidfd = os.pidfd_open(program.pid)
            spawned = b"s" + struct.pack("=IQI", 12, 1, program.pid)
            socket.send_fds(theirs, [spawned], [pidfd])
            os.close(pidfd)
            usage = EXITED.pack(2, 7, 7 << 8, *[0] * 18)
            theirs.send(b"x" + struct.pack("=I", len(usage)) + usage)
            theirs.close()
            template.poll()
            assert program.wait(10) == -signal.SIGTERM
        assert children[1].status == 7 << 8
        for child in children:
            if child.pidfd >= 0:
                os.close(child.pidfd)
                child.pidfd = -1

    arun(main)


def test_what_was_asked_of_a_process_that_is_refused(arun):
    """Their sockets were to come from it: no end of file tells them."""

    async def main():
        template = await afork.Fork.new().ready()
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        template.set(rlimits={resource.RLIMIT_NOFILE: (3, hard)})
        f = template.fork()
        children = [*f.fork_many(3), f.fork()]
        while f._process.error is None:  # ahead of the end of its own socket
            template._process.poll()
        for asked in [f.ready(), *(child.run("os.getpid") for child in children)]:
            with pytest.raises(OSError, match="Too many open files"):
                await asked
        assert not f._process.children
        for each in [f, *children]:
            with pytest.raises(OSError, match="Too many open files"):
                await each.wait()
        template.kill()
        assert await template.wait() == -signal.SIGKILL

    arun(main)
