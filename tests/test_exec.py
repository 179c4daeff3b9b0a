"""exec: the process becomes a program."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import sys
from pathlib import Path

import pytest

import afork

from .scripts.api_ask import ask, read_all, read_pipe


@pytest.fixture
def loop_factory():
    """What happens in the process is the same for every kind of loop."""
    return asyncio.new_event_loop


async def output(f: afork.Fork, *command, **kwargs) -> str:
    sock = await f.exec(*command, stdout=afork.SOCKET, **kwargs)
    text = (await read_all(sock)).decode()
    assert await f.wait() == 0
    return text


def test_program_runs_as_the_same_process(arun):
    async def main():
        f = await afork.Fork.new().ready()
        pid = f.pid
        assert await output(f, "sh", "-c", "echo $$") == f"{pid}\n"
        assert f.pid == pid
        assert f.returncode == 0

    arun(main)


def test_without_a_socket_the_await_gives_none(arun):
    async def main():
        f = afork.Fork.new()
        assert await f.exec("sh", "-c", "exit 7") is None
        assert await f.wait() == 7

    arun(main)


def test_arguments_arrive_exactly(arun, tmp_path):
    words = ["", " ", "a b", "ü", os.fsdecode(b"\xff"), "-n", "$HOME", "*"]

    async def main():
        text = await output(
            afork.Fork.new(),
            "/bin/sh",
            "-c",
            'printf "%s\\0" "$@"',
            b"bytes",
            *words[:4],
        )
        assert text.split("\0")[:-1] == words[:4]
        sock = await afork.Fork.new().exec(
            Path("/bin/sh"), "-c", 'printf "%s\\0" "$@"', tmp_path, *words, stdout=-100
        )
        data = await read_all(sock)
        assert data.split(b"\0")[:-1] == [os.fsencode(w) for w in words]

    arun(main)


# -- streams


def test_socket_serves_several_streams(arun):
    async def main():
        f = afork.Fork.new()
        sock = await f.exec(
            "sh",
            "-c",
            "read line; echo out $line; echo err $line >&2",
            stdin=afork.SOCKET,
            stdout=afork.SOCKET,
            stderr=afork.SOCKET,
        )
        assert type(sock) is socket.socket
        assert sock.gettimeout() == 0
        assert not os.get_inheritable(sock.fileno())
        await asyncio.get_running_loop().sock_sendall(sock, b"in\n")
        assert await read_all(sock) == b"out in\nerr in\n"

    arun(main)


def test_standard_error_as_standard_output(arun):
    async def main():
        script = ("sh", "-c", "echo out; echo err >&2")
        assert (
            await output(afork.Fork.new(), *script, stderr=afork.STDOUT) == "out\nerr\n"
        )
        r, w = os.pipe()
        await afork.Fork.new().exec(*script, stdout=w, stderr=afork.STDOUT)
        os.close(w)
        assert await read_pipe(r) == b"out\nerr\n"

    arun(main)


def test_standard_error_as_the_inherited_standard_output(run_script):
    done = run_script(
        """
import asyncio, afork
async def main():
    f = afork.Fork.new()
    await f.exec("sh", "-c", "echo out; echo err >&2", stderr=afork.STDOUT)
    assert await f.wait() == 0
asyncio.run(main())
""",
    )
    assert (done.stdout, done.stderr) == ("out\nerr\n", "")


def test_devnull_and_inherited_streams(run_script):
    done = run_script(
        """
import asyncio, afork
async def main():
    for kwargs in ({}, {"stdin": afork.DEVNULL}, {"stdout": afork.DEVNULL},
                   {"stderr": afork.DEVNULL}):
        f = afork.Fork.new()
        await f.exec("sh", "-c", "read x; echo out $x; echo err $x >&2", **kwargs)
        assert await f.wait() == 0
asyncio.run(main())
""",
        input="1\n2\n3\n",
    )
    assert done.stdout == "out 1\nout\nout 3\n"
    assert done.stderr == "err 1\nerr\nerr 2\n"


def test_handles_as_streams(arun, tmp_path):
    path = tmp_path / "file"
    path.write_text("input\n")
    log = tmp_path / "log"

    async def main():
        with path.open() as file, log.open("w") as out:
            out.write("before\n")
            f = afork.Fork.new()
            await f.exec("cat", stdin=file, stdout=out, stderr=out.fileno())
        assert await f.wait() == 0

    arun(main)
    assert log.read_text() == "before\ninput\n"


def test_constants_are_those_of_subprocess():
    import subprocess

    assert (afork.DEVNULL, afork.STDOUT) == (subprocess.DEVNULL, subprocess.STDOUT)
    assert afork.SOCKET not in (subprocess.PIPE, subprocess.DEVNULL, subprocess.STDOUT)


def test_wrong_streams_are_refused_at_the_call():
    f = afork.Fork.new()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="STDOUT is for stderr only"):
        f.exec("true", stdin=afork.SOCKET, stdout=afork.STDOUT)
    with pytest.raises(ValueError, match="negative"):
        f.exec("true", stdout=-1)
    with pytest.raises(TypeError, match="needs an int or an object with fileno"):
        f.exec("true", stdout="text")
    with pytest.raises(OSError, match="Bad file descriptor"):
        f.exec("true", stdin=afork.SOCKET, stderr=1 << 20)
    with pytest.raises(ValueError, match="given twice"):
        f.exec("true", stdout=1, fds={1: 2})
    with pytest.raises(ValueError, match="-1 is out of range"):
        f.exec("true", fds={-1: 2})
    assert len(os.listdir("/proc/self/fd")) == before
    f.close()  # none of them has used it up


# -- descriptors

LIST = (
    sys.executable,
    "-ISc",
    "import os; print(*sorted(map(int, os.listdir('/proc/self/fd'))))",
)


def test_the_program_has_stdio_and_what_is_mapped_only(arun):
    async def main():
        # the last one is the directory that is listed
        assert await output(afork.Fork.new(), *LIST) == "0 1 2 3\n"
        f = afork.Fork.new().send_fh(0, 0, 0)
        assert await output(f, *LIST, fds={3: 0, 7: 0, 200: 0}) == "0 1 2 3 4 7 200\n"
        f = afork.Fork.new_exec().fork().fork()
        assert await output(f, *LIST) == "0 1 2 3\n"

    arun(main)


def test_fds_are_mapped_whatever_their_order(arun, tmp_path):
    """Targets overlap with sources, and with the control socket."""
    for name in "abc":
        (tmp_path / name).write_text(name)

    async def main():
        with contextlib.ExitStack() as stack:
            a, b, c = (stack.enter_context((tmp_path / x).open()) for x in "abc")
            for numbers in ((3, 4, 5), (5, 4, 3), (4, 3, 9), (3, 63, 4)):
                for file in (a, b, c):
                    file.seek(0)
                fds = dict(zip(numbers, (a, b, c), strict=True))
                # a shell knows only one digit
                script = "import os, sys; print(*[os.read(int(n), 9).decode() for n in sys.argv[1:]])"
                text = await output(
                    afork.Fork.new(),
                    *(sys.executable, "-ISc", script),
                    *map(str, numbers),
                    fds=fds,
                )
                assert text == "a b c\n"

    arun(main)


def test_mapping_of_0_to_2_and_of_one_handle_twice(arun):
    async def main():
        r, w = os.pipe()
        f = afork.Fork.new()
        await f.exec(
            "sh", "-c", "echo 1; echo 3 >&3; echo 4 >&4", fds={1: w, 3: w, 4: w}
        )
        os.close(w)
        assert await read_pipe(r) == b"1\n3\n4\n"

    arun(main)


def test_special_streams_in_fds(arun):
    async def main():
        f = afork.Fork.new()
        sock = await f.exec(
            "sh",
            "-c",
            "read x <&5; echo $x >&5; cat <&6",
            fds={5: afork.SOCKET, 6: afork.DEVNULL},
        )
        await asyncio.get_running_loop().sock_sendall(sock, b"word\n")
        assert await read_all(sock) == b"word\n"

    arun(main)


def test_mapped_handles_are_blocking_as_they_were(arun):
    async def main():
        a, b = socket.socketpair()
        b.setblocking(False)
        script = "import os; print([os.get_blocking(n) for n in (3, 4)])"
        with a, b:
            f = afork.Fork.new()
            text = await output(f, sys.executable, "-ISc", script, fds={3: a, 4: b})
        assert text == "[True, False]\n"

    arun(main)


# -- environment and directory


def test_environment(arun, monkeypatch):
    monkeypatch.setenv("API_X", "ours")

    async def main():
        assert "API_X=ours" in (await output(afork.Fork.new_exec(), "env")).splitlines()
        env = {"A": "1", "B": "", "C": "a=ü", "PATH": "/usr/bin:/bin"}
        text = await output(afork.Fork.new(), "env", env=env)
        assert sorted(text.splitlines()) == [f"{k}={v}" for k, v in env.items()]
        assert await output(afork.Fork.new(), "/usr/bin/env", env={}) == ""
        # settings of the process, and what eval does to it
        f = afork.Fork.new().set(env={"API_X": "set"})
        assert "API_X=set" in (await output(f, "env")).splitlines()
        f = afork.Fork.new().eval("import os; os.environ['API_X'] = 'eval'")
        assert "API_X=eval" in (await output(f, "env")).splitlines()

    arun(main)


@pytest.mark.parametrize("env", [{"": "x"}, {"a=b": "x"}, {"a": "x\0"}, {"a\0": "x"}])
def test_illegal_environment(env):
    f = afork.Fork.new()
    with pytest.raises(ValueError, match="illegal environment variable"):
        f.exec("true", env=env)
    f.close()


def test_null_bytes():
    f = afork.Fork.new()
    with pytest.raises(ValueError, match="embedded null byte in program"):
        f.exec("a\0b")
    with pytest.raises(ValueError, match="embedded null byte in argument"):
        f.exec("true", "a\0b")
    with pytest.raises(ValueError, match="embedded null byte in cwd"):
        f.exec("true", cwd="a\0b")
    with pytest.raises(TypeError):
        f.exec("true", 1)
    f.close()


def test_working_directory(arun, tmp_path):
    async def main():
        for cwd in (tmp_path, str(tmp_path), os.fsencode(tmp_path)):
            assert await output(afork.Fork.new(), "pwd", cwd=cwd) == f"{tmp_path}\n"
        f = afork.Fork.new().set(cwd="/usr")
        assert await output(f.fork(), "pwd") == "/usr\n"
        assert await output(f.fork(), "pwd", cwd="/") == "/\n"
        assert await output(f, "pwd", cwd="lib") == "/usr/lib\n"

    arun(main)


# -- search


def script(
    path: Path, text: str = "#!/bin/sh\necho found\n", mode: int = 0o755
) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def test_path_search(arun, tmp_path, monkeypatch):
    script(tmp_path / "one" / "api-prog", "no", 0o644)
    script(tmp_path / "two" / "api-prog")
    (tmp_path / "zero" / "api-prog").mkdir(parents=True)
    path = ":".join(f"{tmp_path}/{x}" for x in ("none", "zero", "one", "two"))

    async def main():
        env = {"PATH": path}
        assert await output(afork.Fork.new(), "api-prog", env=env) == "found\n"
        # without one, the environment of the process counts, not ours
        f = afork.Fork.new().set(env={"PATH": path})
        assert await output(f, "api-prog") == "found\n"
        monkeypatch.setenv("PATH", path)
        with pytest.raises(FileNotFoundError):
            await afork.Fork.new().exec("api-prog")
        # an empty entry is the program's working directory
        env = {"PATH": "/nonexistent:"}
        f = afork.Fork.new()
        assert await output(f, "api-prog", env=env, cwd=tmp_path / "two") == "found\n"
        # a name with a slash is not searched
        f = afork.Fork.new()
        assert await output(f, "./api-prog", cwd=tmp_path / "two") == "found\n"

    arun(main)


def test_default_path_without_one(arun, monkeypatch):
    async def main():
        assert await output(afork.Fork.new(), "echo", "x", env={}) == "x\n"
        monkeypatch.delenv("PATH")
        assert await output(afork.Fork.new_exec(), "echo", "x") == "x\n"

    arun(main)


# -- errors


def test_errors_have_errno_and_filename(arun, tmp_path):
    plain = script(tmp_path / "plain", mode=0o644)
    broken = script(tmp_path / "broken", "#!/nonexistent/interpreter\n")
    nonsense = script(tmp_path / "nonsense", "nothing to execute\n")
    cases = [
        ("api-absent", {}, FileNotFoundError, errno.ENOENT, "api-absent"),
        ("/api/absent", {}, FileNotFoundError, errno.ENOENT, "/api/absent"),
        ("", {}, FileNotFoundError, errno.ENOENT, ""),
        (tmp_path, {}, PermissionError, errno.EACCES, str(tmp_path)),
        (plain, {}, PermissionError, errno.EACCES, str(plain)),
        (broken, {}, FileNotFoundError, errno.ENOENT, str(broken)),
        (nonsense, {}, OSError, errno.ENOEXEC, str(nonsense)),
        ("true/x", {}, FileNotFoundError, errno.ENOENT, "true/x"),
        (f"{plain}/x", {}, NotADirectoryError, errno.ENOTDIR, f"{plain}/x"),
        (
            "plain",
            {"env": {"PATH": str(tmp_path)}},
            PermissionError,
            errno.EACCES,
            "plain",
        ),
        (
            "true",
            {"cwd": "/api/absent"},
            FileNotFoundError,
            errno.ENOENT,
            "/api/absent",
        ),
        ("true", {"cwd": plain}, NotADirectoryError, errno.ENOTDIR, str(plain)),
    ]

    async def main():
        for program, kwargs, kind, number, filename in cases:
            f = afork.Fork.new()
            with pytest.raises(kind) as info:
                await f.exec(program, stdout=afork.SOCKET, **kwargs)
            error = info.value
            assert (error.errno, error.filename or "") == (number, filename)
            assert error.strerror == os.strerror(number)
            await f.wait()
        # the template has not suffered
        assert await output(afork.Fork.new(), "echo", "x") == "x\n"

    arun(main)


def test_argument_list_too_long(arun):
    async def main():
        with pytest.raises(OSError, match="Argument list too long") as info:
            await afork.Fork.new().exec("true", "x" * (1 << 20))
        assert info.value.errno == errno.E2BIG
        f = afork.Fork.new()
        with pytest.raises(ValueError, match="over the cap"):
            f.exec("true", "x" * (17 << 20))
        assert await ask(f, "1") == 1  # it was not used up

    arun(main)


def test_error_nobody_awaits_is_logged_once(arun, caplog):
    async def main():
        f = afork.Fork.new()
        f.exec("/api/absent")
        await f.wait()

    arun(main)
    (record,) = caplog.records
    assert record.name == "afork"
    assert "/api/absent" in record.getMessage()


def test_errors_before_exec_are_raised_by_it(arun):
    async def main():
        with pytest.raises(afork.RemoteError, match="ZeroDivisionError"):
            await afork.Fork.new().eval("1 / 0").exec("true")

    arun(main)


# -- the object


def test_not_awaited_runs_all_the_same(arun, tmp_path):
    async def main():
        f = afork.Fork.new()
        f.exec("touch", tmp_path / "touched")
        assert await f.wait() == 0
        assert (tmp_path / "touched").exists()

    arun(main)


def test_cancelling_the_await_kills(arun):
    async def main():
        f = afork.Fork.new().eval("import signal; signal.pause()")
        task = asyncio.create_task(f.exec("true"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await f.wait() == -9

    arun(main)


def test_a_process_that_has_forked_execs_as_a_copy(arun):
    async def main():
        f = await afork.Fork.new().ready()
        child = f.fork()
        original = f.pid
        assert await output(f, "sh", "-c", "echo $PPID") == f"{original}\n"
        assert f.pid != original
        assert await ask(child, "os.getppid()") == original

    arun(main)


def test_configured_after_exec(arun):
    async def main():
        f = afork.Fork.new()
        await f.exec("true")
        with pytest.raises(afork.ClosedError, match="eval after exec"):
            f.eval("1")
        with pytest.raises(afork.ClosedError, match="exec after exec"):
            f.exec("true")
        assert await f.wait() == 0

    arun(main)


def test_signals_reach_the_program(arun):
    async def main():
        f = afork.Fork.new()
        sock = await f.exec("cat", stdin=afork.SOCKET, stdout=afork.SOCKET)
        f.terminate()
        assert await f.wait() == -15
        assert await read_all(sock) == b""

    arun(main)


def test_socket_of_a_program_that_is_not_awaited_is_closed(arun):
    async def main():
        f = afork.Fork.new()
        f.exec("cat", stdin=afork.SOCKET, stdout=afork.DEVNULL)
        assert await f.wait() == 0  # cat has read its end of file

    arun(main)


def test_stage_is_noted(arun):
    async def main():
        with pytest.raises(FileNotFoundError) as info:
            await afork.Fork.new().exec("true", cwd="/api/absent")
        assert info.value.__notes__ == ["afork: cwd failed in the process"]

    arun(main)
