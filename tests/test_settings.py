"""set: environment, directory, masks, limits, titles, and who survives whom."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from pathlib import Path

import pytest

import afork

from .scripts.api_ask import ask, ended, read_all


@pytest.fixture
def loop_factory():
    """What happens in the process is the same for every kind of loop."""
    return asyncio.new_event_loop


def test_environment(arun, monkeypatch):
    monkeypatch.setenv("API_HERE", "ours")

    async def main():
        f = afork.Fork.new_exec().set(
            env={"API_A": "a=b ü", "API_B": "", "API_HERE": None, "API_NONE": None}
        )
        names = "[os.environ.get(n) for n in ('API_A', 'API_B', 'API_HERE')]"
        assert await ask(f.fork(), names) == ["a=b ü", "", None]
        # C's getenv sees the same
        f.eval(
            """
            import ctypes
            getenv = ctypes.CDLL(None).getenv
            getenv.restype = ctypes.c_char_p
            """
        )
        names = "[getenv(n) for n in (b'API_A', b'API_B', b'API_HERE')]"
        assert await ask(f.fork(), names) == ["a=b ü".encode(), b"", None]
        # and so does a program
        sock = await f.exec("env", stdout=afork.SOCKET)
        lines = (await read_all(sock)).decode().splitlines()
        assert "API_A=a=b ü" in lines
        assert "API_B=" in lines
        assert not [x for x in lines if x.startswith("API_HERE")]

    arun(main)
    assert os.environ["API_HERE"] == "ours"


def test_environment_of_bytes_that_are_no_text(arun):
    async def main():
        f = afork.Fork.new().set(env={"API_X": os.fsdecode(b"\xff\xfe")})
        assert await ask(f, "os.environb[b'API_X']") == b"\xff\xfe"

    arun(main)


@pytest.mark.parametrize("name", ["", "a=b", "a\0b"])
def test_illegal_names(name):
    f = afork.Fork.new()
    with pytest.raises(ValueError, match="illegal name of an environment variable"):
        f.set(env={"BEFORE": "1", name: "x"})
    f.close()


def test_working_directory(arun, tmp_path):
    here = os.getcwd()

    async def main():
        for cwd in (tmp_path, str(tmp_path), os.fsencode(tmp_path)):
            f = afork.Fork.new().set(cwd=cwd)
            assert await ask(f, "os.getcwd()") == str(tmp_path)
        f = afork.Fork.new().set(cwd="/nonexistent/x")
        with pytest.raises(afork.RemoteError) as info:
            await f.ready()
        assert (info.value.stage, info.value.type) == ("set", "FileNotFoundError")
        assert info.value.message.endswith(": '/nonexistent/x'")
        assert await ask(afork.Fork.new(), "os.getcwd()") == here

    arun(main)


def test_umask(arun, tmp_path):
    ours = os.umask(0o22)
    os.umask(ours)

    async def main():
        f = afork.Fork.new().set(umask=0o77, cwd=tmp_path)
        mode = "(open('file', 'w').close(), os.stat('file').st_mode & 0o777)[1]"
        assert await ask(f, mode) == 0o600
        assert await ask(afork.Fork.new(), "os.umask(0)") == ours
        assert await ask(afork.Fork.new().set(umask=0), "os.umask(1)") == 0

    arun(main)


def test_limits(arun):
    async def main():
        limits = {
            resource.RLIMIT_NOFILE: (100, 200),
            resource.RLIMIT_CORE: (0, 0),
            resource.RLIMIT_CPU: (resource.RLIM_INFINITY, resource.RLIM_INFINITY),
        }
        f = afork.Fork.new().set(rlimits=limits).require("resource")
        names = f"[resource.getrlimit(n) for n in {[int(n) for n in limits]}]"
        assert await ask(f.fork(), names) == list(limits.values())
        f.set(rlimits={resource.RLIMIT_NOFILE: (100, 50)})
        with pytest.raises(afork.RemoteError) as info:
            await f.ready()
        assert (info.value.stage, info.value.type) == ("set", "ValueError")

    arun(main)


def titles(pid: int) -> tuple[bytes, str]:
    line = Path(f"/proc/{pid}/cmdline").read_bytes()
    return line.rstrip(b"\0"), Path(f"/proc/{pid}/comm").read_text().rstrip("\n")


WAIT = "def wait(sock, *args): sock.recv(1)"


def test_title(arun):
    async def main():
        template = await afork.Fork.new_exec().ready()
        assert titles(template.pid) == (b"afork: template", "afork:template")
        f = template.fork().eval(WAIT)
        sock = await f.run("wait")
        assert titles(f.pid) == (b"afork: worker wait", "afork:workerwai")
        sock.close()

        template.set(title="mine: kept")
        f = template.fork().eval(WAIT)
        sock = await f.run("wait")
        assert titles(f.pid) == (b"mine: kept", "mine:kept")
        sock.close()

        long = "x" * 5000 + " ü"
        f = await template.fork().set(title=long).ready()
        line, comm = titles(f.pid)
        # as much as there is room for
        assert len(line) > 100
        assert long.encode().startswith(line)
        assert comm == "x" * 15
        template.close()

    arun(main)


def test_title_of_a_callable(arun, tmp_path, monkeypatch):
    (tmp_path / "api_titled.py").write_text("def f(sock): sock.recv(1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    async def main():
        f = afork.Fork.new()
        sock = await f.run("api_titled.f")
        assert titles(f.pid)[0] == b"afork: worker api_titled.f"
        sock.close()

    arun(main)


def test_settings_are_inherited_and_can_be_changed(arun):
    async def main():
        template = afork.Fork.new_exec().set(env={"API_A": "1"}, umask=0o7, cwd="/")
        child = template.fork().set(env={"API_A": "2"})
        what = "(os.environ['API_A'], os.umask(0), os.getcwd())"
        assert await ask(child.fork(), what) == ("2", 7, "/")
        assert await ask(template.fork(), what) == ("1", 7, "/")
        child.close()
        template.close()

    arun(main)


def test_nothing_set_is_no_request():
    f = afork.Fork.new()
    assert f.set() is f
    assert f.set(env={}, rlimits={}) is f
    f.close()


def test_only_keywords():
    f = afork.Fork.new()
    with pytest.raises(TypeError):
        f.set({"A": "1"})
    with pytest.raises(TypeError):
        f.set(nice=3)
    f.close()


DETACH = """
import asyncio, os, signal, sys
import afork

async def main():
    f = afork.Fork.new().send_fh(1).eval('''
def stay(sock, out):
    import os
    out.write(b"%d\\\\n" % os.getpid())
    import signal
    signal.pause()
''')
    DETACH
    sock = await f.run("stay")
    sock.close()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read, 1)

asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["kill", "exit"])
@pytest.mark.parametrize("detached", [True, False])
def test_who_survives_the_application(detached, how):
    import subprocess
    import sys

    line = "f.set(detach=True)" if detached else ""
    app = subprocess.Popen(
        [sys.executable, "-P", "-c", DETACH.replace("DETACH", line)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    pid = int(app.stdout.readline())
    worker = os.pidfd_open(pid)
    children = Path(f"/proc/{app.pid}/task/{app.pid}/children").read_text().split()
    if how == "kill":
        app.kill()
    app.stdin.close()
    app.wait(10)
    app.stdout.close()  # a worker that survives holds the other end
    try:
        for child in children:
            assert ended(int(child)), "the template has outlived the application"
        if detached:
            assert not ended(pid, 0)
            signal.pidfd_send_signal(worker, signal.SIGTERM)
        assert ended(pid)
    finally:
        os.close(worker)


def test_detached_template_does_not_outlive_us_idle(run_script):
    """Nothing holds its socket any more, so it ends by itself."""
    done = run_script(
        """
import asyncio, afork
async def main():
    f = await afork.Fork.new_exec().set(detach=True).ready()
    print(f.pid)
asyncio.run(main())
"""
    )
    assert ended(int(done.stdout))


def test_detach_can_be_taken_back(arun):
    async def main():
        f = afork.Fork.new().set(detach=True)
        f.eval("import ctypes; prctl = ctypes.CDLL(None).prctl; sig = ctypes.c_int()")
        what = "(prctl(2, ctypes.byref(sig)), sig.value)"
        assert await ask(f.fork(), what) == (0, 0)
        assert await ask(f.fork().set(detach=False), what) == (0, signal.SIGKILL)
        f.close()

    arun(main)
