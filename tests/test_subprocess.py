"""create_subprocess_exec and _shell, against asyncio's own on the same calls."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from pathlib import Path

import pytest

import afork

from .scripts.api_ask import PYTHONPATH, ended

BOTH = [
    pytest.param(
        (afork.create_subprocess_exec, afork.create_subprocess_shell), id="afork"
    ),
    # what asyncio does is the expectation: each test holds for it as well
    pytest.param(
        (asyncio.create_subprocess_exec, asyncio.create_subprocess_shell), id="own"
    ),
]


@pytest.fixture(params=BOTH)
def make(request, loop_factory):
    """create_subprocess_exec"""
    yield _choose(request, loop_factory)[0]
    _join_waiters()


@pytest.fixture(params=BOTH)
def make_shell(request, loop_factory):
    """create_subprocess_shell"""
    yield _choose(request, loop_factory)[1]
    _join_waiters()


def _choose(request, loop_factory):
    own = request.param[0].__module__ == "asyncio.subprocess"
    if own and loop_factory is not asyncio.new_event_loop:
        pytest.skip("uvloop's own differs from asyncio's in many ways")
    return request.param


def _join_waiters():
    """asyncio's own has a thread for each process, which ends a little later."""
    for thread in threading.enumerate():
        if "waitpid" in thread.name:
            thread.join()
            # for Python it is gone already; nothing tells when the kernel agrees
            while Path(f"/proc/self/task/{thread.native_id}").exists():
                os.sched_yield()


async def output(make, *command, **kwargs) -> str:
    p = await make(*command, stdout=PIPE, **kwargs)
    out, err = await p.communicate()
    assert (p.returncode, err) == (0, None)
    return out.decode()


def test_surface(arun, make):
    # The standard library's own has stopped to raise in 3.14.
    silent = make is asyncio.create_subprocess_exec and sys.version_info >= (3, 14)

    async def main():
        p = await make("sh", "-c", "exit 3")
        assert type(p) is asyncio.subprocess.Process
        assert isinstance(p.pid, int)
        assert p.stdin is p.stdout is p.stderr is None
        assert await p.wait() == 3
        assert p.returncode == 3
        assert await p.wait() == 3
        if not silent:
            with pytest.raises(ProcessLookupError):
                p.send_signal(0)

    arun(main)


def test_communicate(arun, make):
    async def main():
        p = await make(
            "sh", "-c", "cat; echo err >&2", stdin=PIPE, stdout=PIPE, stderr=PIPE
        )
        assert await p.communicate(b"in") == (b"in", b"err\n")
        assert p.returncode == 0

    arun(main)


def test_conversation(arun, make):
    async def main():
        p = await make("cat", stdin=PIPE, stdout=PIPE)
        for line in (b"one\n", b"two\n"):
            p.stdin.write(line)
            await p.stdin.drain()
            assert await p.stdout.readline() == line
        p.stdin.close()
        assert await p.stdout.read() == b""
        assert await p.wait() == 0

    arun(main)


def test_big_output_and_input(arun, make):
    size = 5_000_000

    async def main():
        p = await make("cat", stdin=PIPE, stdout=PIPE)
        out, _ = await p.communicate(b"x" * size)
        assert len(out) == size

    arun(main)


def test_limit_of_a_line(arun, make):
    async def main():
        p = await make("sh", "-c", "printf %0200d 1", stdout=PIPE, limit=50)
        with pytest.raises(ValueError, match="limit"):
            await p.stdout.readline()
        p._transport.close()
        await p.wait()

    arun(main)


def test_output_merged(arun, make):
    async def main():
        script = ("sh", "-c", "echo out; echo err >&2")
        assert await output(make, *script, stderr=STDOUT) == "out\nerr\n"

    arun(main)


def test_files_sockets_and_numbers_as_streams(arun, make, tmp_path):
    (tmp_path / "in").write_text("input")

    async def main():
        a, b = socket.socketpair()
        with (
            a,
            b,
            (tmp_path / "in").open() as file,
            (tmp_path / "err").open("w") as err,
        ):
            p = await make(
                "sh", "-c", "cat; echo e >&2", stdin=file, stdout=b, stderr=err.fileno()
            )
            assert await p.wait() == 0
            assert a.recv(99) == b"input"
        assert (tmp_path / "err").read_text() == "e\n"

    arun(main)


def test_standard_streams_of_the_application(run_script):
    for name in ("afork", "asyncio"):
        done = run_script(
            f"""
import asyncio, afork
async def main():
    for kwargs in ({{}}, {{"stdin": -3}}, {{"stdout": -3}}, {{"stderr": -3}}, {{"stderr": -2}}):
        p = await {name}.create_subprocess_exec(
            "sh", "-c", "read x; echo out $x; echo err $x >&2", **kwargs)
        assert await p.wait() == 0
asyncio.run(main())
""",
            input="1\n2\n3\n4\n",
            env={**os.environ, "PYTHONPATH": PYTHONPATH},
        )
        assert done.stdout == "out 1\nout\nout 3\nout 4\nerr 4\n", name
        assert done.stderr == "err 1\nerr\nerr 2\n", name


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_standard_streams(tmp_path, closed):
    """A descriptor of something else must not turn up under the number."""
    script = tmp_path / "main.py"
    script.write_text(
        """
import asyncio, os, sys
for n in map(int, sys.argv[2].split(",")):
    os.close(n)
import afork
async def main():
    p = await afork.create_subprocess_exec(
        "sh", "-c", 'ls -l /proc/self/fd > "$0"; exit 5', sys.argv[1])
    os._exit(await p.wait())
asyncio.run(main())
"""
    )
    listing = tmp_path / "listing"
    done = subprocess.run(
        [sys.executable, str(script), str(listing), ",".join(map(str, closed))],
        stdin=DEVNULL,
        capture_output=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    assert done.returncode == 5, done
    found = dict(
        line.split()[-3::2] for line in listing.read_text().splitlines() if "->" in line
    )
    for n in closed:
        if n != 1:  # the shell has put its own there
            assert found[str(n)] == "/dev/null"
    assert sorted(found) == ["0", "1", "2", "3"]


def test_environment(arun, make, monkeypatch):
    async def main():
        monkeypatch.setenv("API_X", "at the call")
        assert await output(make, "sh", "-c", "echo $API_X") == "at the call\n"
        monkeypatch.setenv("API_X", "at another")
        assert await output(make, "sh", "-c", "echo $API_X") == "at another\n"
        monkeypatch.delenv("API_X")
        assert await output(make, "sh", "-c", "echo ${API_X-unset}") == "unset\n"
        assert await output(make, "/usr/bin/env", env={"A": "ü"}) == "A=ü\n"

    arun(main)


def test_working_directory(arun, make, tmp_path, monkeypatch):
    async def main():
        monkeypatch.chdir(tmp_path)
        assert await output(make, "pwd") == f"{tmp_path}\n"
        monkeypatch.chdir("/usr")
        assert await output(make, "pwd") == "/usr\n"
        assert await output(make, "pwd", cwd=tmp_path) == f"{tmp_path}\n"
        assert await output(make, "pwd", cwd="lib") == "/usr/lib\n"

    arun(main)


def test_working_directory_that_was_deleted(run_script, tmp_path):
    for name in ("afork", "asyncio"):
        gone = tmp_path / "gone"
        gone.mkdir()
        done = run_script(
            f"""
import asyncio, os
import afork
os.rmdir(os.getcwd())
async def main():
    p = await {name}.create_subprocess_exec("readlink", "/proc/self/cwd")
    assert await p.wait() == 0
asyncio.run(main())
""",
            cwd=gone,
            env={**os.environ, "PYTHONPATH": PYTHONPATH},
        )
        assert done.stdout == f"{gone} (deleted)\n", name


def test_umask(arun, make):
    async def main():
        old = os.umask(0o123)
        try:
            assert await output(make, "sh", "-c", "umask") == "0123\n"
        finally:
            os.umask(old)
        assert await output(make, "sh", "-c", "umask", umask=0o57) == "0057\n"

    arun(main)


def test_sessions_and_groups(arun, make):
    ask = "import os; print(os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid())"
    python = (sys.executable, "-ISc", ask)

    async def main():
        answers = []
        for kwargs in (
            {},
            {"start_new_session": True},
            {"process_group": 0},
        ):
            answers.append(await output(make, *python, **kwargs))
        assert answers == ["False False\n", "True True\n", "False True\n"]

    arun(main)


def test_pass_fds(arun, make):
    async def main():
        r, w = os.pipe()
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, r)
            stack.callback(os.close, w)
            other = os.dup(w)
            stack.callback(os.close, other)
            os.set_inheritable(other, True)  # and is not passed all the same
            script = "import os, sys; os.write(int(sys.argv[1]), b'passed'); print(os.path.exists('/proc/self/fd/' + sys.argv[2]))"
            text = await output(
                make,
                *(sys.executable, "-ISc", script, str(w), str(other)),
                pass_fds=(w,),
            )
            assert text == "False\n"
            assert os.read(r, 99) == b"passed"

    arun(main)


def test_errors(arun, make, tmp_path):
    (tmp_path / "plain").write_text("")
    (tmp_path / "nonsense").write_text("nonsense")
    (tmp_path / "nonsense").chmod(0o755)
    cases = [
        (("api-absent",), {}),
        (("/api/absent",), {}),
        ((str(tmp_path),), {}),
        ((str(tmp_path / "plain"),), {}),
        ((str(tmp_path / "nonsense"),), {}),
        ((tmp_path / "plain",), {}),
        (("true",), {"cwd": "/api/absent"}),
        (("true",), {"cwd": tmp_path / "plain"}),
        (("true", "x" * (1 << 20)), {}),
    ]

    async def main():
        for command, kwargs in cases:
            with pytest.raises(OSError) as own:  # noqa: PT011
                subprocess.Popen(command, **kwargs)
            with pytest.raises(type(own.value)) as info:
                await make(*command, stdin=PIPE, stdout=PIPE, **kwargs)
            assert info.value.errno == own.value.errno
            assert os.fspath(info.value.filename) == os.fspath(own.value.filename)
        assert await output(make, "echo", "x") == "x\n"

    arun(main)


def test_signals(arun, make):
    async def main():
        for send, code in (
            (lambda p: p.kill(), -9),
            (lambda p: p.terminate(), -15),
            (lambda p: p.send_signal(signal.SIGUSR1), -10),
        ):
            p = await make("cat", stdin=PIPE, stdout=PIPE)
            send(p)
            assert await p.wait() == code
            assert await p.communicate() == (b"", None)

    arun(main)


def test_timeout(arun, make):
    async def main():
        p = await make("cat", stdin=PIPE, stdout=PIPE)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(p.wait(), 0.01)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await p.stdout.read()
        p.stdin.close()
        assert await p.wait() == 0

    arun(main)


def test_many_at_once(arun, make):
    async def main():
        texts = await asyncio.gather(*(output(make, "echo", str(n)) for n in range(30)))
        assert texts == [f"{n}\n" for n in range(30)]

    arun(main)


def test_shell(arun, make_shell):
    async def main():
        for command in ("echo $((40 + 2))", b"echo $((40 + 2))"):
            p = await make_shell(command, stdout=PIPE)
            assert await p.communicate() == (b"42\n", None)
        p = await make_shell("exit 7")
        assert await p.wait() == 7
        p = await make_shell("echo $0 >&2", stderr=PIPE)
        assert await p.communicate() == (None, b"/bin/sh\n")
        with pytest.raises(ValueError, match="cmd must be a string"):
            await make_shell(["echo"])

    arun(main)


def test_executable(arun, make):
    async def main():
        text = await output(make, "myname", "-c", "echo $0", executable="/bin/sh")
        assert text == "myname\n"

    arun(main)


def test_text_modes_are_refused(arun, make):
    async def main():
        for kwargs in (
            {"universal_newlines": True},
            {"text": True},
            {"encoding": "utf-8"},
            {"errors": "strict"},
            {"bufsize": 1},
        ):
            with pytest.raises(ValueError):  # noqa: PT011
                await make("true", **kwargs)

    arun(main)


# -- ours


def test_what_cannot_be_done_from_a_template_is_refused(arun):
    async def main():
        for kwargs in (
            {"preexec_fn": print},
            {"close_fds": False},
            {"restore_signals": False},
            {"user": 0},
            {"group": 0},
            {"extra_groups": []},
            {"pipesize": 4096},
        ):
            (name,) = kwargs
            with pytest.raises(ValueError, match=f"{name} is not possible"):
                await afork.create_subprocess_exec("true", **kwargs)
            with pytest.raises(ValueError, match=f"{name} is not possible"):
                await afork.create_subprocess_shell("true", **kwargs)
        for kwargs, text in (  # as asyncio says it, and why
            ({"text": True}, "text must be False: "),
            ({"universal_newlines": True}, "universal_newlines must be False: "),
            ({"encoding": "utf-8"}, "encoding must be None: "),
            ({"errors": "strict"}, "errors must be None: "),
            ({"bufsize": 1}, "bufsize must be 0: "),
        ):
            with pytest.raises(ValueError, match=f"^{text}the streams are of bytes"):
                await afork.create_subprocess_exec("true", **kwargs)
        with pytest.raises(TypeError, match="unexpected keyword argument 'nice'"):
            await afork.create_subprocess_exec("true", nice=1)
        with pytest.raises(ValueError, match="STDOUT can only be used for stderr"):
            await afork.create_subprocess_exec("true", stdout=STDOUT)
        # what asks for nothing is accepted
        p = await afork.create_subprocess_exec(
            "true", preexec_fn=None, close_fds=True, restore_signals=True, user=None
        )
        assert await p.wait() == 0
        p = await afork.create_subprocess_exec(
            "true", text=False, universal_newlines=None, encoding=None, bufsize=0
        )
        assert await p.wait() == 0

    arun(main)


def test_parent_is_the_default_template(arun):
    async def main():
        text = await output(afork.create_subprocess_exec, "sh", "-c", "echo $PPID")
        assert int(text) == (await afork.Fork.default().ready()).pid

    arun(main)


def test_cancelled_while_it_starts(arun):
    async def main():
        default = await afork.Fork.default().ready()
        default.send_signal(signal.SIGSTOP)
        task = asyncio.create_task(
            afork.create_subprocess_exec("cat", stdin=PIPE, stdout=PIPE)
        )
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        default.send_signal(signal.SIGCONT)
        await default.ready()

    arun(main)


def test_template_that_dies_meanwhile(arun):
    async def main():
        default = await afork.Fork.default().ready()
        p = await afork.create_subprocess_exec("cat", stdin=PIPE, stdout=PIPE)
        q = afork.create_subprocess_exec("cat", stdin=PIPE, stdout=PIPE)
        default.kill()
        # died with it; who started it can no longer say how
        assert await p.wait() in (-9, 255)
        with contextlib.suppress(afork.TemplateError):
            q = await q
            q.kill()
            await q.wait()
        assert await output(afork.create_subprocess_exec, "echo", "x") == "x\n"

    arun(main)


def test_programs_die_with_the_application():
    app = subprocess.Popen(
        [
            sys.executable,
            "-P",
            "-c",
            """
import asyncio, afork
async def main():
    p = await afork.create_subprocess_exec("sleep", "600")
    print(p.pid, flush=True)
    await p.wait()
asyncio.run(main())
""",
        ],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    pid = int(app.stdout.readline())
    app.kill()
    app.wait(10)
    app.stdout.close()
    assert ended(pid)


def test_no_descriptor_stays_here_or_there(arun):
    async def main():
        default = await afork.Fork.default().ready()
        await output(afork.create_subprocess_exec, "true")

        def count():
            return (
                len(os.listdir("/proc/self/fd")),
                len(os.listdir(f"/proc/{default.pid}/fd")),
            )

        before = count()
        for _ in range(5):
            assert await output(afork.create_subprocess_exec, "echo") == "\n"
            with pytest.raises(FileNotFoundError):
                await afork.create_subprocess_exec("api-absent", stdin=PIPE)
        await default.ready()
        assert count() == before

    arun(main)
