"""The process behind the object: pid, status, signals, the end."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from pathlib import Path

import pytest

import afork

from .scripts.api_ask import ask, code_is_lost_or, ended, read_all

PAUSE = "import signal\ndef pause(sock, *args): signal.pause()"


def test_pid_is_known_once_reported(arun):
    async def main():
        f = afork.Fork.new()
        assert f.pid is None
        await f.ready()
        pid = f.pid
        assert Path(f"/proc/{pid}/status").exists()
        assert await ask(f, "os.getpid()") == pid
        await f.wait()
        assert f.pid == pid

    arun(main)


def test_pid_of_new_exec_is_known_at_once(arun):
    async def main():
        f = afork.Fork.new_exec()
        pid = f.pid
        assert isinstance(pid, int)
        assert await ask(f, "os.getpid()") == pid
        assert await f.wait() == 0

    arun(main)


def test_pid_of_every_process_of_a_tree(arun):
    async def main():
        f = afork.Fork.new().fork().fork()
        assert await ask(f, "os.getpid()") == f.pid

    arun(main)


@pytest.mark.parametrize("make", [afork.Fork.new, afork.Fork.new_exec])
def test_returncode_and_wait(arun, make):
    async def main():
        f = make().eval("import os\ndef end(sock, code): os._exit(int(code))")
        f.send_arg("41")
        sock = await f.run("end")
        assert await f.wait() == 41
        assert f.returncode == 41
        assert await f.wait() == 41
        sock.close()

    arun(main)


def test_returncode_while_it_runs(arun):
    async def main():
        f = afork.Fork.new().eval(PAUSE)
        assert f.returncode is None
        sock = await f.run("pause")
        assert f.returncode is None
        f.kill()
        assert await f.wait() == -9
        assert f.returncode == -9
        sock.close()

    arun(main)


def test_waiting_together(arun):
    async def main():
        f = afork.Fork.new().eval(PAUSE)
        sock = await f.run("pause")
        waiting = [asyncio.create_task(f.wait()) for _ in range(3)]
        await asyncio.sleep(0)
        f.send_signal(signal.SIGTERM)
        assert await asyncio.gather(*waiting) == [-15] * 3
        sock.close()

    arun(main)


def test_cancelling_wait_leaves_the_process_alone(arun):
    async def main():
        f = afork.Fork.new().eval("def echo(sock): sock.sendall(sock.recv(9))")
        sock = await f.run("echo")
        task = asyncio.create_task(f.wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.get_running_loop().sock_sendall(sock, b"alive")
        assert await read_all(sock) == b"alive"
        assert await f.wait() == 0

    arun(main)


@pytest.mark.parametrize("make", [afork.Fork.new, afork.Fork.new_exec])
def test_rusage(arun, make):
    async def main():
        f = make().eval("x = b'x' * (50 << 20)\nfor i in range(10 ** 6): pass")
        assert f.rusage is None
        f.close()
        assert await f.wait() == 0
        usage = f.rusage
        assert isinstance(usage, resource.struct_rusage)
        assert 50 << 10 < usage.ru_maxrss < 500 << 10
        assert 0.001 < usage.ru_utime + usage.ru_stime < 10
        assert usage.ru_minflt > 1000

    arun(main)


# -- signals


def test_signal_before_start_waits_for_it(arun):
    async def main():
        f = afork.Fork.new().eval(PAUSE)
        f.run("pause")
        assert f.pid is None
        f.send_signal(signal.SIGKILL)
        assert await f.wait() == -9

    arun(main)


def test_signals_to_a_worker(arun):
    async def main():
        f = afork.Fork.new().eval(
            """
            import signal
            def work(sock):
                signal.signal(signal.SIGUSR1, lambda *args: sock.sendall(b"USR1 "))
                sock.sendall(b"ready ")
                while True:
                    signal.pause()
            """
        )
        sock = await f.run("work")
        loop = asyncio.get_running_loop()
        assert await loop.sock_recv(sock, 99) == b"ready "
        f.send_signal(signal.SIGUSR1)
        assert await loop.sock_recv(sock, 99) == b"USR1 "
        f.send_signal(10)
        assert await loop.sock_recv(sock, 99) == b"USR1 "
        f.terminate()
        assert await f.wait() == -15
        sock.close()

    arun(main)


@pytest.mark.parametrize("make", [afork.Fork.new, afork.Fork.new_exec])
def test_signals_to_one_that_has_ended(arun, make):
    async def main():
        f = make()
        f.close()
        await f.wait()
        for call in (lambda: f.send_signal(0), f.kill):
            with pytest.raises(ProcessLookupError):
                call()

    arun(main)


def test_wrong_signals_are_refused(arun):
    async def main():
        f = afork.Fork.new().eval(PAUSE)
        with pytest.raises((TypeError, ValueError)):
            f.send_signal("TERM")
        sock = await f.run("pause")
        f.send_signal(0)  # asks only
        f.kill()
        await f.wait()
        sock.close()

    arun(main)


def test_terminate_before_run_is_close(arun):
    async def main():
        f = afork.Fork.new().eval("x = 1")
        f.terminate()
        assert await f.wait() == 0
        with pytest.raises(afork.ClosedError, match="eval after close"):
            f.eval("1")

    arun(main)


def test_template_ignores_the_terminals_signals(arun):
    async def main():
        template = await afork.Fork.new_exec().ready()
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP):
            template.send_signal(number)
        assert await ask(template.fork(), "os.getppid()") == template.pid
        assert os.getsid(template.pid) == template.pid
        template.close()
        assert await template.wait() == 0

    arun(main)


def test_kill_ends_whatever_it_does(arun):
    async def main():
        f = await afork.Fork.new().ready()
        f.eval(
            "import signal\nfor n in (1, 2, 15): signal.signal(n, 1)\nsignal.pause()"
        )
        f.kill()
        assert await f.wait() == -9
        with pytest.raises(afork.WorkerLost) as info:
            await f.ready()
        assert (info.value.pid, info.value.status) == (f.pid, 9)
        assert str(info.value) == (
            f"the process has died (pid {f.pid}, killed by SIGKILL)"
        )

    arun(main)


# -- close


def test_close_ends_after_what_is_queued(arun, tmp_path):
    async def main():
        f = afork.Fork.new()
        f.eval("open(args[0], 'w').close()", str(tmp_path / "done"))
        f.close()
        f.close()
        assert await f.wait() == 0
        assert (tmp_path / "done").exists()
        for call in (lambda: f.run("os.getpid"), lambda: f.exec("true"), f.fork):
            with pytest.raises(afork.ClosedError, match="after close"):
                call()

    arun(main)


def test_close_after_run_does_nothing(arun):
    async def main():
        f = afork.Fork.new().eval("def echo(sock): sock.sendall(sock.recv(9))")
        sock = await f.run("echo")
        f.close()
        await asyncio.get_running_loop().sock_sendall(sock, b"alive")
        assert await read_all(sock) == b"alive"
        assert await f.wait() == 0

    arun(main)


def test_context_manager_closes_and_waits(arun):
    async def main():
        async with afork.Fork.new() as f:
            await f.ready()
        assert f.returncode == 0
        async with afork.Fork.new_exec() as template:
            async with template.fork() as f:
                assert await ask(f, "1") == 1
            assert f.returncode == 0
        assert template.returncode == 0

    arun(main)


def test_context_manager_waits_for_a_worker(arun):
    async def main():
        async with afork.Fork.new().eval("import sys") as f:
            f.eval("def end(sock): sys.exit(4)")
            (await f.run("end")).close()
        assert f.returncode == 4

    arun(main)


def test_context_manager_raises_what_nobody_has_seen(arun):
    async def main():
        with pytest.raises(afork.RemoteError, match="ZeroDivisionError"):
            async with afork.Fork.new() as f:
                await f.eval("1 / 0").ready()
        assert f.returncode is not None

    arun(main)


def test_context_manager_kills_on_exceptions(arun):
    async def main():
        with pytest.raises(LookupError):  # noqa: PT012
            async with afork.Fork.new().eval(PAUSE) as f:
                sock = await f.run("pause")
                raise LookupError
        assert f.returncode == -9
        sock.close()

    arun(main)


def test_repr_tells_the_state(arun):
    async def main():
        f = afork.Fork.new().eval(PAUSE)
        assert repr(f) == "<afork.Fork pid=None starting>"
        await f.ready()
        assert repr(f) == f"<afork.Fork pid={f.pid} serving>"
        sock = await f.run("pause")
        assert repr(f) == f"<afork.Fork pid={f.pid} run>"
        f.kill()
        await f.wait()
        assert repr(f) == f"<afork.Fork pid={f.pid} exited -9>"
        sock.close()
        f = afork.Fork.new().eval("1 / 0")
        with pytest.raises(afork.RemoteError):
            await f.ready()
        assert repr(f) == f"<afork.Fork pid={f.pid} failed>"
        f = await afork.Fork.new().ready()
        f.close()  # and its end may be known already
        states = ("closed", "exited 0")
        assert repr(f) in [f"<afork.Fork pid={f.pid} {state}>" for state in states]
        await f.wait()
        assert repr(f) == f"<afork.Fork pid={f.pid} exited 0>"

    arun(main)


# -- not our children


def test_waiting_for_one_whose_template_is_closed(arun):
    async def main():
        template = afork.Fork.new_exec()
        f = template.fork().eval("def end(sock): import os; sock.recv(1); os._exit(3)")
        sock = await f.run("end")
        template.close()
        sock.close()
        assert await f.wait() == 3
        assert await template.wait() == 0

    arun(main)


def test_waiting_for_one_whose_template_was_killed(arun):
    """It dies with its template; the kernel tells its status where it can."""

    async def main():
        template = afork.Fork.new_exec()
        f = template.fork().eval(PAUSE)
        sock = await f.run("pause")
        template.kill()
        assert await template.wait() == -9
        assert await code_is_lost_or(-9, f)
        assert ended(f.pid)
        sock.close()

    arun(main)


def test_waiting_for_one_that_could_never_start(arun):
    async def main():
        template = await afork.Fork.new_exec().ready()
        template.kill()
        await template.wait()
        f = template.fork()
        with pytest.raises(afork.TemplateError) as info:
            await f.wait()
        assert info.value.pid == template.pid
        with pytest.raises(afork.TemplateError):
            await f.run("os.getpid")

    arun(main)


def test_status_taken_by_somebody_who_waits_for_all(arun):
    """os.wait() in the application takes the template's status from us."""

    async def main():
        f = await afork.Fork.new_exec().ready()
        f.kill()
        os.waitid(os.P_PID, f.pid, os.WEXITED)  # takes it
        assert await code_is_lost_or(-9, f)

    arun(main)


def test_status_taken_in_the_template(arun):
    """Evaluated code that waits for all children of the template."""

    async def main():
        template = afork.Fork.new_exec()
        f = await template.fork().ready()
        template.eval(
            "import os; os.kill(int(args[0]), 9); os.waitpid(int(args[0]), 0)",
            str(f.pid),
        )
        await template.ready()
        assert await code_is_lost_or(-9, f)
        assert await ask(template.fork(), "1") == 1
        template.close()

    arun(main)


def test_no_zombies(arun):
    async def main():
        template = await afork.Fork.new_exec().ready()
        for f in (forks := template.fork_many(20)):
            f.close()
        for f in forks:
            await f.wait()
        children = Path(f"/proc/{template.pid}/task/{template.pid}/children")
        assert children.read_text() == ""
        template.close()

    arun(main)
