"""Objects that go away: work is done first, then the process ends."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import stat
from pathlib import Path

import pytest

import afork

from .scripts.api_ask import ask, ended, read_pipe


def test_without_work_the_process_ends(arun):
    async def main():
        f = await afork.Fork.new().ready()
        fd = os.pidfd_open(f.pid)
        del f
        gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(fd, gone.set)
        await gone.wait()
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)

    arun(main)


def test_without_work_it_ends_without_a_loop():
    f = afork.Fork.new_exec()
    pid = f.pid
    del f
    gc.collect()
    assert ended(pid)


def test_queued_work_is_done(arun):
    """More than the socket takes: the rest is sent after the object has gone."""

    async def main():
        r, w = os.pipe()
        f = afork.Fork.new().send_fh(w)
        os.close(w)
        f.eval("import os\nn = 0")
        for _ in range(40):
            f.eval("n += len(args[0])", b"x" * 50_000)
        f.eval("def finish(sock, out): out.write(b'%d' % n)").run("finish")
        del f
        gc.collect()
        assert await read_pipe(r) == b"2000000"

    arun(main)


def test_queued_evals_are_done(arun, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    async def main():
        r = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        f = afork.Fork.new()
        f.eval("out = open(args[0], 'wb', 0)", str(fifo))
        for n in range(30):
            f.eval(f"out.write(b'{n} ')", b"x" * 50_000)
        await f.fork().ready()
        del f
        gc.collect()
        expected = "".join(f"{n} " for n in range(30)).encode()
        assert await read_pipe(r) == expected

    arun(main)


def test_error_of_a_dropped_object_is_logged_once(arun, caplog):
    async def main():
        keep = afork.Fork.new()
        f = keep.fork().eval("raise LookupError('nobody listens')")
        del f
        gc.collect()
        # the process that it was forked from answers after it
        await keep.ready()
        while not caplog.records:
            await keep.ready()

    arun(main)
    (record,) = caplog.records
    assert record.name == "afork"
    assert "LookupError: nobody listens" in record.getMessage()


def test_error_that_was_raised_is_not_logged_when_dropped(arun, caplog):
    async def main():
        f = afork.Fork.new().eval("1 / 0")
        with pytest.raises(afork.RemoteError):
            await f.ready()
        del f
        gc.collect()
        await afork.Fork.new().ready()

    arun(main)
    gc.collect()
    assert caplog.records == []


def test_half_closed_template_reports_until_its_last_child(arun):
    async def main():
        template = afork.Fork.new_exec()
        pid = template.pid
        workers = template.fork_many(3)
        for f in workers:
            f.eval("import os\ndef end(sock, n): sock.recv(1); os._exit(int(n))")
        socks = [await f.send_arg(str(n)).run("end") for n, f in enumerate(workers, 10)]
        fd = os.pidfd_open(pid)
        del template
        gc.collect()
        for n, (sock, f) in enumerate(zip(socks, workers, strict=True), 10):
            # it is still there: somebody has to reap
            assert Path(f"/proc/{pid}/cmdline").read_bytes()
            sock.close()
            assert await f.wait() == n
        gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(fd, gone.set)
        await gone.wait()
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)

    arun(main)


def test_children_outlive_the_object_of_their_template(arun):
    async def main():
        child = afork.Fork.new().eval("x = 1").fork().fork()
        gc.collect()
        assert await ask(child, "x") == 1

    arun(main)


def test_dropped_while_awaited(arun):
    async def main():
        assert await ask(afork.Fork.new_exec(), "1") == 1
        await afork.Fork.new_exec().ready()
        assert await afork.Fork.new().exec("true") is None
        f = afork.Fork.new()
        waiting = asyncio.create_task(f.wait())
        await asyncio.sleep(0)
        f.close()
        del f
        assert await waiting == 0

    arun(main)


def test_dropping_the_default_templates_object_keeps_it(arun):
    async def main():
        pid = (await afork.Fork.default().ready()).pid
        gc.collect()
        assert (await afork.Fork.default().ready()).pid == pid
        assert await ask(afork.Fork.new(), "os.getppid()") == pid

    arun(main)


def test_reference_cycles_are_collected(arun):
    async def main():
        f = await afork.Fork.new_exec().ready()
        fd = os.pidfd_open(f.pid)
        cycle = [f]
        cycle.append(cycle)
        del f, cycle
        gc.collect()
        gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(fd, gone.set)
        await gone.wait()
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)

    arun(main)


@pytest.mark.parametrize("program", [True, False])
def test_what_is_collected_unawaited_holds_no_socket_object(arun, program):
    """It would warn, if it came first in the cycle; the number is closed."""

    async def main():
        f = afork.Fork.new()
        if program:
            cycle = [f, f.exec("true", stdin=afork.SOCKET)]
        else:
            cycle = [f, f.run("afork._child.trial")]
        cycle.append(cycle)
        assert await f.wait() == 0
        fd = f._process.held
        assert stat.S_ISSOCK(os.fstat(fd).st_mode)
        assert not any(
            isinstance(x, socket.socket) for x in gc.get_referents(f._process)
        )
        inode = os.fstat(fd).st_ino
        del f, cycle
        gc.collect()
        links = [f"/proc/self/fd/{x}" for x in os.listdir("/proc/self/fd")]
        assert inode not in [os.stat(x).st_ino for x in links if os.path.exists(x)]

    arun(main)


def test_interpreter_that_ends_with_objects_alive(run_script):
    done = run_script(
        """
import asyncio, afork
kept = []
async def main():
    f = await afork.Fork.new_exec().ready()
    g = f.fork().eval("import signal; signal.pause()")
    h = f.fork().eval("import signal\\ndef p(sock): signal.pause()")
    sock = await h.run("p")
    kept.extend([f, g, h, sock])
    await asyncio.sleep(0)
    print(f.pid, h.pid)
asyncio.run(main())
kept.pop().close()
""",
    )
    assert done.stderr == ""
    for pid in done.stdout.split():
        assert ended(int(pid))
