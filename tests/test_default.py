"""The default template: made on first use, replaced when it has died."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

import afork
from afork import _default

from .scripts.api_ask import ask, read_all


async def pid() -> int:
    return (await afork.Fork.default().ready()).pid


def test_made_on_first_use(arun):
    async def main():
        assert _default._default is None
        afork.Fork.new_exec()
        assert _default._default is None
        f = afork.Fork.new()
        assert _default._default is not None
        assert await ask(f, "os.getppid()") == await pid()

    arun(main)


def test_one_object(arun):
    async def main():
        assert afork.Fork.default() is afork.Fork.default()
        assert await ask(afork.Fork(), "os.getppid()") == await pid()

    arun(main)


def test_closed_by_hand_is_replaced(arun):
    async def main():
        old = await afork.Fork.default().eval("x = 1").ready()
        old.close()
        new = afork.Fork.default()
        assert new is not old
        assert await ask(afork.Fork.new(), "'x' in globals()") is False
        assert await old.wait() == 0
        assert new.pid != old.pid

    arun(main)


@pytest.mark.parametrize("noticed", [True, False])
def test_dead_one_is_replaced(arun, noticed):
    async def main():
        old = await afork.Fork.default().ready()
        fd = os.pidfd_open(old.pid)
        os.kill(old.pid, signal.SIGKILL)
        if noticed:
            assert await old.wait() == -9
        else:
            import select

            # dead, and nobody has looked
            assert select.select([fd], [], [], 10)[0]
        os.close(fd)
        f = afork.Fork.new()
        assert await ask(f, "os.getppid()") == await pid() != old.pid

    arun(main)


def test_run_on_the_default_itself_leaves_it_a_template(arun):
    async def main():
        default = afork.Fork.default()
        await default.fork().ready()
        before = default.pid
        assert await ask(default, "os.getppid()") == before
        # that object has become something; new processes still have a parent
        assert await ask(afork.Fork.new(), "1") == 1

    arun(main)


def test_failed_default_tells_each_process_why(arun):
    async def main():
        afork.Fork.default().eval("raise LookupError('in the default')")
        for _ in range(2):
            with pytest.raises(afork.RemoteError, match="in the default"):
                await afork.Fork.new().run("os.getpid")

    arun(main)


def test_sent_requests_fail_and_unsent_ones_move(arun):
    """A stopped template with a full socket, killed: at most once each."""

    async def main():
        old = await afork.Fork.default().eval("first = True").ready()
        old.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, old.pid, os.WSTOPPED)
        fs = []
        # until requests pile up here
        while not old._process.channel.queued or len(fs) < 120:
            f = afork.Fork.new().eval("def f(sock): sock.sendall(b'%d' % os.getppid())")
            fs.append(f.eval("import os"))
            assert len(fs) < 5000
        more = [afork.Fork.new() for _ in range(20)]
        for f in more:
            f.eval("import os\ndef f(sock): sock.sendall(b'%d' % os.getppid())")
        fs += more
        runs = [f.run("f") for f in fs]
        old.kill()
        results = await asyncio.gather(*runs, return_exceptions=True)
        new = await pid()
        assert new != old.pid
        moved = 0
        for n, result in enumerate(results):
            if isinstance(result, BaseException):
                assert type(result) is afork.TemplateError, result
                assert result.pid == old.pid
                assert result.status == 9
                assert not moved, (
                    f"sent in order, but {n} was lost after one that was not"
                )
            else:
                moved += 1
                assert await read_all(result) == b"%d" % new
        assert 20 <= moved < len(fs)

    arun(main)


def test_moved_requests_keep_what_was_queued_for_them(arun):
    async def main():
        old = await afork.Fork.default().ready()
        old.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, old.pid, os.WSTOPPED)
        while not old._process.channel.queued:
            afork.Fork.new()
        r, w = os.pipe()
        f = afork.Fork.new().eval("x = args[0]", "kept").send_arg("a").send_fh(w)
        os.close(w)
        tree = f.fork()
        old.kill()
        assert await ask(f, "(x, args[0], args[1].write(b'w'))") == ("kept", "a", 1)
        assert await ask(tree, "(x, len(args))") == ("kept", 2)
        with open(r, "rb") as file:
            assert file.read() == b"w"

    arun(main)


def test_requests_do_not_go_round(arun, tmp_path, monkeypatch):
    """A template that dies at once must not be asked for ever."""
    path = tmp_path / "python-that-ends"
    path.write_text("#!/bin/sh\nexit 9\n")
    path.chmod(0o755)
    monkeypatch.setattr(afork, "python", str(path))

    async def main():
        fs = [afork.Fork.new() for _ in range(5)]
        for f in fs:
            with pytest.raises(afork.TemplateError) as info:
                await f.run("os.getpid")
            assert info.value.status == 9 << 8
        monkeypatch.undo()
        assert await ask(afork.Fork.new(), "1") == 1

    arun(main)


def test_workers_of_a_killed_default_die_with_it(arun):
    async def main():
        f = afork.Fork.new().eval("import signal\ndef pause(sock): signal.pause()")
        sock = await f.run("pause")
        afork.Fork.default().kill()
        assert await read_all(sock) == b""
        assert await ask(afork.Fork.new(), "1") == 1

    arun(main)


def test_error_names_what_killed_the_template(arun):
    async def main():
        old = afork.Fork.default().eval("import os, signal")
        await old.ready()
        # both have been sent before the first of them is read
        old.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, old.pid, os.WSTOPPED)
        old.eval("os.kill(os.getpid(), signal.SIGSEGV)")
        f = afork.Fork.new()
        old.send_signal(signal.SIGCONT)
        with pytest.raises(afork.TemplateError, match="killed by SIGSEGV") as info:
            await f.run("os.getpid")
        assert info.value.pid == old.pid

    arun(main)


def test_shutdown_is_for_tests(arun):
    async def main():
        return await pid()

    first = arun(main)
    _default.shutdown()
    assert _default._default is None
    assert arun(main) != first
