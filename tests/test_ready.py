"""ready: everything queued so far has run, or raises its error."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

import afork

from .scripts.api_ask import ask


def test_everything_before_it_has_run(arun, tmp_path):
    async def main():
        f = afork.Fork.new().set(cwd=tmp_path)
        for n in range(20):
            f.eval("open(args[0], 'w').close()", str(n))
        assert await f.ready() is f
        assert len(list(tmp_path.iterdir())) == 20
        assert f.pid is not None
        assert f.returncode is None

    arun(main)


def test_again_and_together(arun):
    async def main():
        f = afork.Fork.new()
        await f.ready()
        await asyncio.gather(f.ready(), f.ready(), f.fork().ready())
        assert await ask(f, "42") == 42

    arun(main)


def test_does_not_block_the_loop_while_it_waits(arun, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    async def main():
        f = afork.Fork.new().eval("open(args[0], 'rb').close()", str(fifo))
        waiting = asyncio.create_task(f.ready())
        other = await ask(afork.Fork.new(), "1")
        assert other == 1
        assert not waiting.done()
        os.close(os.open(fifo, os.O_WRONLY))
        await waiting

    arun(main)


def test_error_of_the_past_is_raised_each_time(arun):
    async def main():
        f = afork.Fork.new().eval("1 / 0")
        for _ in range(3):
            with pytest.raises(afork.RemoteError, match="ZeroDivisionError"):
                await f.ready()
        f.close()
        with pytest.raises(afork.ClosedError, match="ready after close"):
            await f.ready()

    arun(main)


def test_each_gets_an_exception_of_its_own(arun):
    """One exception raised in two places would mix up their tracebacks."""

    async def main():
        f = afork.Fork.new().eval("1 / 0")
        one, two = await asyncio.gather(f.ready(), f.ready(), return_exceptions=True)
        assert type(one) is type(two) is afork.RemoteError
        assert one is not two
        assert str(one) == str(two)
        assert one.__notes__ == two.__notes__ if hasattr(one, "__notes__") else True

    arun(main)


def test_cancelling_leaves_the_process_alone(arun):
    async def main():
        f = afork.Fork.new()
        task = asyncio.create_task(f.ready())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await f.ready()
        assert await ask(f, "1") == 1

    arun(main)


def test_template_that_cannot_start(arun, tmp_path):
    """The interpreter is executed, but is none."""
    path = tmp_path / "python-broken"
    path.write_text("#!/bin/sh\nexit 7\n")
    path.chmod(0o755)

    async def main():
        f = afork.Fork.new_exec(python=path)
        with pytest.raises(afork.TemplateError) as info:
            await f.ready()
        assert info.value.pid == f.pid
        assert info.value.status == 7 << 8
        assert f.returncode == 7

    arun(main)


@pytest.mark.parametrize("kind", ["absent", "directory", "not executable"])
def test_interpreter_that_does_not_exist(kind, tmp_path, monkeypatch):
    path = tmp_path / "python"
    if kind == "directory":
        path.mkdir()
    elif kind == "not executable":
        path.write_text("")
    error = FileNotFoundError if kind == "absent" else PermissionError
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error) as info:
        afork.Fork.new_exec(python=path)
    assert info.value.filename == str(path)
    monkeypatch.setattr(afork, "python", str(path))
    for make in (afork.Fork.new, afork.Fork.new_exec, afork.Fork.default):
        with pytest.raises(error) as info:
            make()
        assert info.value.filename == str(path)
    monkeypatch.undo()
    del info
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the hub's


def test_python_attribute_is_what_templates_run(arun, tmp_path, monkeypatch):
    import sys

    path = tmp_path / "my-python"
    marker = tmp_path / "marker"
    path.write_text(f'#!/bin/sh\n: > "{marker}"\nexec "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    monkeypatch.setattr(afork, "python", str(path))

    async def main():
        assert await ask(afork.Fork.new(), "1") == 1
        assert marker.exists()

    arun(main)


@pytest.mark.parametrize("executable", ["", None, "/usr/bin/embedding-program"])
def test_python_is_found_without_sys_executable(arun, monkeypatch, executable):
    import sys

    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(sys, "_base_executable", executable, raising=False)

    async def main():
        version = await ask(afork.Fork.new(), "tuple(sys.version_info[:3])")
        assert version == sys.version_info[:3]

    arun(main)


def test_template_of_another_version_is_refused(arun, monkeypatch):
    from afork import _interpreter

    monkeypatch.setattr(_interpreter, "__version__", "0.0.other")

    async def main():
        for f in (afork.Fork.new_exec(), afork.Fork.new()):
            with pytest.raises(afork.TemplateError) as info:
                await f.ready()
            assert "0.0.other" in str(info.value)
            assert afork.__version__ in str(info.value)

    arun(main)


def test_killed_while_ready_is_awaited(arun):
    async def main():
        f = afork.Fork.new().eval("import signal; signal.pause()")
        task = asyncio.create_task(f.ready())
        while f.pid is None:
            await asyncio.sleep(0)
        f.kill()
        with pytest.raises(afork.WorkerLost, match="killed by SIGKILL"):
            await task

    arun(main)


def test_proc_of_a_ready_process_is_a_child_of_the_template(arun):
    async def main():
        default = await afork.Fork.default().ready()
        f = await afork.Fork.new().ready()
        children = Path(f"/proc/{default.pid}/task/{default.pid}/children")
        assert children.read_text().split() == [str(f.pid)]

    arun(main)
