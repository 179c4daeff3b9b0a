"""Programs and interpreters that cannot be started."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import sys

import pytest

import afork
from afork import _interpreter

from .scripts.fault_tools import descriptors_of, log, stop  # noqa: F401 - fixtures


@pytest.fixture
def loop_factory():
    """One kind will do: what is tested here is on this side of the loop."""
    return asyncio.new_event_loop


@pytest.fixture
def bad_programs(tmp_path):
    """(program, errno) for each way not to be one."""
    plain = tmp_path / "plain"
    plain.write_text("#!/bin/sh\n")
    lost = tmp_path / "lost"
    lost.write_text("#!/no/such/interpreter\n")
    lost.chmod(0o755)
    text = tmp_path / "text"
    text.write_bytes(b"\x7fELF, almost\n")
    text.chmod(0o755)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    busy = tmp_path / "busy"
    busy.write_bytes(b"#!/bin/sh\n")
    busy.chmod(0o755)
    with busy.open("ab"):  # written to while it is executed
        yield [
            ("/no/such/program", errno.ENOENT),
            ("no-such-program-in-path", errno.ENOENT),
            ("", errno.ENOENT),
            (str(plain), errno.EACCES),
            (str(tmp_path), errno.EACCES),
            (str(lost), errno.ENOENT),
            (str(text), errno.ENOEXEC),
            (str(loop), errno.ELOOP),
            (str(plain / "below"), errno.ENOTDIR),
            (str(busy), errno.ETXTBSY),
            ("/" + "x" * 5000, errno.ENAMETOOLONG),
        ]


async def program_works():
    p = await afork.create_subprocess_exec("sh", "-c", "exit 7")
    assert await p.wait() == 7
    f = afork.Fork.new()
    assert await f.exec("sh", "-c", "exit 8") is None
    assert await f.wait() == 8


def test_exec_of_what_is_no_program(arun, bad_programs):
    async def main():
        template = afork.Fork.default()
        await template.ready()
        before = descriptors_of(template.pid)
        for program, number in bad_programs:
            f = afork.Fork.new()
            with pytest.raises(OSError) as info:  # noqa: PT011 - errno below
                await f.exec(program, "argument")
            assert info.value.errno == number, program
            assert info.value.filename == (program or None)
            f.close()
            # It executes nothing more, and ends by itself.
            assert await f.wait() == 0
        await program_works()
        assert afork.Fork.default().pid == template.pid
        assert descriptors_of(template.pid) == before

    arun(main)


def test_programs_that_are_none(arun, bad_programs):
    async def main():
        template = afork.Fork.default()
        await template.ready()
        before = descriptors_of(template.pid)
        for program, number in bad_programs:
            with pytest.raises(OSError) as info:  # noqa: PT011 - errno below
                await afork.create_subprocess_exec(program, "argument")
            assert info.value.errno == number, program
            assert info.value.filename == (program or None)
        await program_works()
        assert afork.Fork.default().pid == template.pid
        assert descriptors_of(template.pid) == before
        assert template._process.children == {}

    arun(main)


def test_argument_list_too_long(arun):
    long = "x" * (1 << 17)  # one byte too many, with its end

    async def main():
        for args in ([long], ["x" * 4096] * 1000):
            with pytest.raises(OSError, match="too long") as info:
                await afork.create_subprocess_exec("true", *args)
            assert info.value.errno == errno.E2BIG
            with pytest.raises(OSError, match="too long") as info:
                await afork.Fork.new().exec("true", *args)
            assert info.value.errno == errno.E2BIG
        p = await afork.create_subprocess_exec("true", long[:-1])
        assert await p.wait() == 0
        with pytest.raises(OSError, match="too long"):
            await afork.create_subprocess_exec("true", env={"x": long})

    arun(main)


def test_requests_over_the_cap_are_refused_at_the_call(arun):
    huge = "x" * (17 << 20)

    async def main():
        await program_works()
        template = afork.Fork.default()
        with pytest.raises(ValueError, match="cap"):
            await afork.create_subprocess_exec("true", huge, stdin=-1)
        f = afork.Fork.new()
        with pytest.raises(ValueError, match="cap"):
            f.exec("true", huge, stdin=afork.SOCKET)
        # Nothing of it has been queued: the object is as it was.
        assert await f.exec("sh", "-c", "exit 3") is None
        assert await f.wait() == 3
        assert afork.Fork.default().pid == template.pid

    arun(main)


def test_more_descriptors_than_a_request_may_have(arun):
    r, w = os.pipe()
    fds = [os.dup(r) for _ in range(65)]

    async def main():
        with pytest.raises(ValueError, match="64"):
            await afork.create_subprocess_exec("true", pass_fds=tuple(fds))
        f = afork.Fork.new()
        with pytest.raises(ValueError, match="64"):
            f.exec("true", fds={100 + fd: fd for fd in fds})
        f.close()
        assert await f.wait() == 0
        await program_works()

    try:
        arun(main)
    finally:
        for fd in (r, w, *fds):
            os.close(fd)


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"fds": {-1: 0}}, ValueError),
        ({"fds": {1 << 31: 0}}, ValueError),
        ({"fds": {1: 0}, "stdout": 0}, ValueError),
        ({"fds": {5: -1}}, ValueError),
        ({"fds": {5: 9999}}, OSError),
        ({"fds": {"5": 0}}, TypeError),
        ({"stdin": "text"}, TypeError),
        ({"stdin": afork.STDOUT}, ValueError),
        ({"stdout": 9999}, OSError),
        ({"env": {"a=b": "c"}}, ValueError),
        ({"env": {"a": 5}}, TypeError),
        ({"cwd": 5}, TypeError),
        ({"cwd": "nul\0inside"}, ValueError),
    ],
)
def test_bad_arguments_are_refused_at_the_call(arun, kwargs, error):
    async def main():
        f = afork.Fork.new()
        with pytest.raises(error):
            f.exec("true", **kwargs)
        # The object is as it was.
        assert await f.exec("sh", "-c", "exit 3") is None
        assert await f.wait() == 3

    arun(main)


@pytest.mark.parametrize("words", [(5,), ("true", 5), (None,), ("nul\0",), ("a", "\0")])
def test_words_that_are_no_text(arun, words):
    async def main():
        f = afork.Fork.new()
        with pytest.raises((TypeError, ValueError)):
            f.exec(*words)
        f.close()
        assert await f.wait() == 0
        with pytest.raises((TypeError, ValueError)):
            await afork.create_subprocess_exec(*words)

    arun(main)


def test_descriptors_beyond_the_limit(arun):
    async def main():
        for number in (70_000, (1 << 30) - 1):
            f = afork.Fork.new()
            with pytest.raises(OSError) as info:  # noqa: PT011 - errno below
                await f.exec("true", fds={number: 0})
            assert info.value.errno in (errno.EBADF, errno.EINVAL, errno.EMFILE)
        await program_works()

    arun(main)


def test_working_directories_that_are_none(arun, tmp_path):
    (tmp_path / "file").write_text("")

    async def main():
        for cwd, number in [
            ("/no/such/directory", errno.ENOENT),
            (str(tmp_path / "file"), errno.ENOTDIR),
        ]:
            with pytest.raises(OSError) as info:  # noqa: PT011 - errno below
                await afork.create_subprocess_exec("true", cwd=cwd)
            assert (info.value.errno, info.value.filename) == (number, cwd)
            with pytest.raises(OSError) as info:  # noqa: PT011 - errno below
                await afork.Fork.new().exec("true", cwd=cwd)
            assert (info.value.errno, info.value.filename) == (number, cwd)
        await program_works()

    arun(main)


def test_exec_that_nobody_awaits_fails_into_the_log(arun, log):  # noqa: F811
    async def main():
        f = afork.Fork.new()
        f.exec("/no/such/program")
        process = f._process
        await process.until(lambda: process.error is not None)

    arun(main)
    assert len(log.lines) == 1
    assert "/no/such/program" in log.lines[0]
    log.lines.clear()


# -- interpreters


@pytest.mark.parametrize("path", ["/no/such/python", "/", "/etc/hostname"])
def test_an_interpreter_that_cannot_be_executed(arun, monkeypatch, path):
    async def main():
        with pytest.raises(OSError, match=path) as info:
            afork.Fork.new_exec(python=path)
        assert info.value.filename == path
        with monkeypatch.context() as patch:
            patch.setattr(afork, "python", path)
            for make in (afork.Fork.new, afork.Fork.default, afork.Fork.new_exec):
                with pytest.raises(OSError, match=path) as info:
                    make()
                assert info.value.filename == path
            with pytest.raises(OSError, match=path):
                await afork.create_subprocess_exec("true")
        await program_works()

    arun(main)


@pytest.mark.parametrize("program", ["true", "false", "cat"])
def test_an_interpreter_that_is_none(arun, monkeypatch, program):
    status = {"true": 0, "false": 1, "cat": 1}[program]

    async def main():
        f = afork.Fork.new_exec(python=f"/bin/{program}")
        with pytest.raises(afork.TemplateError) as info:
            await f.ready()
        assert os.waitstatus_to_exitcode(info.value.status) == status
        assert info.value.pid == f.pid
        with monkeypatch.context() as patch:
            patch.setattr(afork, "python", f"/bin/{program}")
            children = [afork.Fork.new() for _ in range(5)]
            for child in children:
                with pytest.raises(afork.TemplateError) as info:
                    await child.run("os.getpid")
                assert os.waitstatus_to_exitcode(info.value.status) == status
            with pytest.raises(afork.TemplateError):
                await afork.create_subprocess_exec("true")
        await program_works()

    arun(main)


def test_an_interpreter_that_never_answers_is_killed_with_its_object(arun, tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexec sleep 1000\n")
    script.chmod(0o755)

    async def main():
        f = afork.Fork.new_exec(python=script)
        child = f.fork()
        f.kill()
        assert await f.wait() == -9
        with pytest.raises(afork.TemplateError):
            await child.ready()

    arun(main)


def test_a_template_of_another_version_is_refused(arun, monkeypatch, capfd):
    async def main():
        with monkeypatch.context() as patch:
            patch.setattr(_interpreter, "__version__", "0.0.1")
            f = afork.Fork.new_exec()
        with pytest.raises(afork.TemplateError) as info:
            await f.fork().run("os.getpid")
        assert "0.0.1" in str(info.value)
        assert afork.__version__ in str(info.value)
        with pytest.raises(afork.TemplateError, match=r"0\.0\.1"):
            await f.ready()
        with pytest.raises(afork.TemplateError, match=r"0\.0\.1"):
            await f.eval("print('executed')").require("this").run("os.getpid")
        await program_works()

    arun(main)
    assert capfd.readouterr().out == ""


def test_a_package_that_is_not_there(arun, monkeypatch, tmp_path, capfd):
    # Removed or half upgraded while the application runs.
    copy = tmp_path / "afork"
    copy.mkdir()
    (copy / "__init__.py").write_text("")

    async def main():
        with monkeypatch.context() as patch:
            patch.setattr(_interpreter, "__file__", str(copy / "_interpreter.py"))
            f = afork.Fork.new_exec()
        with pytest.raises(afork.TemplateError) as info:
            await f.ready()
        assert os.waitstatus_to_exitcode(info.value.status) == 1
        await program_works()

    arun(main)
    assert "afork._child" in capfd.readouterr().err


def test_new_from_fh_of_what_is_no_control_socket(arun, tmp_path):
    async def main():
        with pytest.raises(TypeError):
            afork.Fork.new_from_fh(0)
        with pytest.raises(TypeError):
            afork.Fork.new_from_fh(object())
        with socket.socket() as inet, pytest.raises(ValueError, match="unix"):
            afork.Fork.new_from_fh(inet)
        closed = socket.socket(socket.AF_UNIX)
        closed.close()
        with pytest.raises(ValueError, match="open"):
            afork.Fork.new_from_fh(closed)
        with socket.socket(socket.AF_UNIX) as alone, pytest.raises(OSError) as info:  # noqa: PT011
            afork.Fork.new_from_fh(alone)
        assert info.value.errno == errno.ENOTCONN
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with pair[0], pair[1], pytest.raises(ValueError, match="stream"):
            afork.Fork.new_from_fh(pair[0])

    arun(main)


def test_the_executable_may_be_unknown(arun, monkeypatch):
    async def main():
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", "")
            patch.setattr(sys, "_base_executable", "")
            f = afork.Fork.new_exec()
        await f.ready()

    arun(main)
