"""Code that goes wrong in a process: the caller is told, the template lives."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

import afork

from .conftest import read_all
from .scripts.fault_tools import ECHO, log, stop  # noqa: F401 - fixtures


@pytest.fixture
def loop_factory():
    """One kind will do: what is tested here is on this side of the loop."""
    return asyncio.new_event_loop


async def echo(f=None):
    """The next request works."""
    f = f or afork.Fork.new()
    assert await read_all(await f.eval(ECHO).send_arg("x").run("echo")) == b"('x',)"


BAD_NAMES = [
    ("os.no_such_function", "AttributeError"),
    ("os.path.nothing.here", "AttributeError"),
    ("no_such_module.f", "ModuleNotFoundError"),
    ("os.no_such_module.f", "AttributeError"),
    ("no_such_module:f", "ModuleNotFoundError"),
    ("no_such_name", "AttributeError"),
    ("os.sep", "TypeError"),  # not callable
    (".", "ModuleNotFoundError|ValueError|AttributeError"),
    (":", "ModuleNotFoundError|ValueError|AttributeError"),
    ("os.", "AttributeError"),
]


@pytest.mark.parametrize(("name", "kind"), BAD_NAMES)
def test_names_that_cannot_be_run(arun, name, kind):
    async def main():
        template = afork.Fork.default()
        await template.ready()
        f = afork.Fork.new()
        with pytest.raises(afork.RemoteError) as info:
            await f.run(name)
        assert info.value.stage == "run"
        assert info.value.type in kind.split("|")
        await echo()
        assert afork.Fork.default().pid == template.pid

    arun(main)


BAD_CODE = [
    ("def", "SyntaxError"),
    ("x = '\\udcff", "SyntaxError"),
    ("\0", "SyntaxError|ValueError"),
    ("(" * 1000, "SyntaxError|MemoryError|RecursionError"),
    ("1 / 0", "ZeroDivisionError"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("import sys; sys.exit(7)", "SystemExit"),
    ("exit()", "SystemExit"),
    ("import no_such_module", "ModuleNotFoundError"),
    ("def f(): f()\nf()", "RecursionError"),
    ("raise MemoryError", "MemoryError"),
    (
        "class E(BaseException):\n    def __str__(self): raise SystemExit\nraise E",
        "__main__.E",
    ),
    ("raise ExceptionGroup('g', [ValueError(1), OSError(2)])", "ExceptionGroup"),
]


@pytest.mark.parametrize(("code", "kind"), BAD_CODE)
def test_code_that_raises(arun, code, kind):
    async def main():
        template = afork.Fork.default()
        await template.ready()
        for ask in ("ready", "run"):
            f = afork.Fork.new().eval(code)
            with pytest.raises(afork.RemoteError) as info:
                await (f.ready() if ask == "ready" else f.run("os.getpid"))
            assert info.value.stage == "eval"
            assert info.value.type in kind.split("|")
            f.close()
            assert await f.wait() == 0
        await echo()
        assert afork.Fork.default().pid == template.pid

    arun(main)


def test_the_end_of_an_endless_message_is_what_arrives(arun):
    async def main():
        f = afork.Fork.new().eval("raise ValueError('x' * (1 << 20) + 'end')")
        with pytest.raises(afork.RemoteError) as info:
            await f.ready()
        assert len(info.value.message) <= 1 << 16
        assert info.value.message.endswith("xend")

    arun(main)


def test_modules_that_cannot_be_imported(arun, tmp_path, monkeypatch):
    (tmp_path / "fault_raises.py").write_text("1 / 0\n")
    (tmp_path / "fault_exits.py").write_text("import sys; sys.exit()\n")
    (tmp_path / "fault_syntax.py").write_text("def\n")
    (tmp_path / "fault_dies.py").write_text("import os; os._exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)

    async def main():
        for name, kind in [
            ("no_such_module", "ModuleNotFoundError"),
            ("os.no_such", "ModuleNotFoundError"),
            ("fault_raises", "ZeroDivisionError"),
            ("fault_exits", "SystemExit"),
            ("fault_syntax", "SyntaxError"),
        ]:
            with pytest.raises(afork.RemoteError) as info:
                await afork.Fork.new().require("os", name).run("os.getpid")
            assert (info.value.stage, info.value.type) == ("require", kind)
        f = afork.Fork.new().require("fault_dies")
        with pytest.raises(afork.WorkerLost) as lost:
            await f.run("os.getpid")
        assert os.waitstatus_to_exitcode(lost.value.status) == 3
        await echo()

    arun(main)


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("import os; os._exit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import os; os.abort()", -signal.SIGABRT),
        ("import os; os.closerange(3, 64)", 1),
    ],
)
def test_code_that_ends_its_process(arun, code, end):
    async def main():
        template = afork.Fork.default()
        await template.ready()
        f = afork.Fork.new().eval(
            "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))"
        )
        f.eval(code)
        with pytest.raises(afork.WorkerLost) as info:
            await f.run("os.getpid")
        assert os.waitstatus_to_exitcode(info.value.status) == end
        assert info.value.pid == f.pid
        assert await f.wait() == end
        await echo()
        assert afork.Fork.default().pid == template.pid

    arun(main)


def test_code_that_ends_a_template(arun):
    async def main():
        template = afork.Fork.default().eval("import os; os.kill(os.getpid(), 9)")
        child = afork.Fork.new()
        with pytest.raises(afork.TemplateError) as info:
            await child.run("os.getpid")
        assert info.value.status == 9
        with pytest.raises(afork.TemplateError) as info:
            await template.ready()
        assert info.value.status == 9
        await echo()
        assert afork.Fork.default().pid not in (None, info.value.pid)

    arun(main)


def test_a_failed_template_gives_every_child_its_error(arun):
    async def main():
        template = afork.Fork.new_exec().require("no_such_module")
        children = [template.fork() for _ in range(3)]
        grandchild = children[0].fork()
        for f in (*children, grandchild):
            with pytest.raises(afork.RemoteError, match="no_such_module") as info:
                await f.run("os.getpid")
            assert info.value.traceback
            await f._process.until(lambda p=f._process: p.gone)
        assert template._process.children == {}
        template.close()
        assert await template.wait() == 0

    arun(main)


def test_threads_do_not_stop_a_template(arun):
    async def main():
        template = afork.Fork.new_exec().eval(
            """
            import threading
            done = threading.Event()
            thread = threading.Thread(target=done.wait)
            thread.start()
            """
        )
        await echo(template.fork())
        await echo(template.fork())
        await template.eval("done.set(); thread.join()").ready()
        template.close()
        assert await template.wait() == 0

    arun(main)


HANDLERS = """
import os, signal
seen = []
def handler(number, frame):
    seen.append(number)
    raise {kind}
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1,
               signal.SIGCHLD, signal.SIGALRM):
    signal.signal(number, handler)
"""


@pytest.mark.parametrize("kind", ["ValueError", "SystemExit", "KeyboardInterrupt"])
def test_signal_handlers_that_raise_in_an_idle_template(arun, capfd, kind):
    async def main():
        template = afork.Fork.new_exec().eval(HANDLERS.format(kind=kind))
        await template.ready()
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            template.send_signal(number)
        await echo(template.fork())
        # USR1 is the code's own; the others only a worker gets back.
        await template.eval("assert seen == [signal.SIGUSR1], seen").ready()
        f = template.fork().eval(
            "def show(sock):\n"
            "    sock.sendall(repr(signal.getsignal(signal.SIGTERM) is handler).encode())"
        )
        assert await read_all(await f.run("show")) == b"True"
        template.close()
        assert await template.wait() == 0

    arun(main)
    assert kind in capfd.readouterr().err


@pytest.mark.parametrize(
    "number", ["SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP", "SIGTSTP"]
)
def test_terminal_and_stop_signals_leave_the_template_alone(arun, number):
    async def main():
        template = afork.Fork.default()
        await template.ready()
        f = afork.Fork.new()
        await f.ready()
        for process in (template, f):
            process.send_signal(getattr(signal, number))
        await echo(f)
        await echo()
        assert afork.Fork.default().pid == template.pid

    arun(main)


def test_programs_run_by_code_keep_their_status(arun):
    async def main():
        f = afork.Fork.new_exec().eval(
            """
            import subprocess
            assert subprocess.run("exit 7", shell=True).returncode == 7
            popen = subprocess.Popen(["sh", "-c", "exit 8"])
            import os
            assert os.system("exit 9") >> 8 == 9
            """
        )
        await f.ready()
        # Meanwhile the template has children of its own, that it reaps.
        first = f.fork()
        await echo(first)
        assert await first.wait() == 0
        await f.eval("assert popen.wait() == 8").ready()
        f.close()
        assert await f.wait() == 0

    arun(main)


def test_code_that_reaps_everything(arun):
    async def main():
        template = afork.Fork.new_exec()
        child = template.fork()
        await child.ready()
        template.eval(
            """
            import os
            pid, status = os.waitpid(-1, 0)
            """
        )
        child.kill()
        await template.ready()
        # The status went elsewhere, but the end is known.
        with pytest.raises(afork.WorkerLost, match="not known"):
            await child.wait()
        await echo(template.fork())
        template.close()
        assert await template.wait() == 0

    arun(main)


def test_a_function_that_fails_is_told_by_its_status(arun, capfd):
    async def main():
        f = afork.Fork.new().eval("def f(sock): 1 / 0")
        assert await read_all(await f.run("f")) == b""
        assert await f.wait() == 1
        f = afork.Fork.new().eval("def f(sock): import sys; sys.exit(5)")
        assert await read_all(await f.run("f")) == b""
        assert await f.wait() == 5

    arun(main)
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_nobody_awaits_so_the_log_is_told_once(arun, log):  # noqa: F811
    async def main():
        f = afork.Fork.new()
        f.run("os.no_such_function")
        process = f._process
        await process.until(lambda: process.error is not None)
        f = afork.Fork.new().eval("1 / 0")
        process = f._process
        await process.until(lambda: process.error is not None)

    arun(main)
    assert len(log.lines) == 2
    assert "no_such_function" in log.lines[0]
    assert "ZeroDivisionError" in log.lines[1]
    log.lines.clear()


def test_frames_of_eval_do_not_leak_arguments(arun):
    async def main():
        f = afork.Fork.new().eval("1 / 0", "x")
        with pytest.raises(afork.RemoteError):
            await f.ready()
        # It executes nothing more.
        with pytest.raises(afork.RemoteError, match="ZeroDivisionError"):
            await f.eval("import os; os._exit(9)").ready()
        f.close()
        assert await f.wait() == 0

    arun(main)


def test_the_traceback_is_there_although_warnings_are_errors(run_script):
    """3.15 warns of what its own __main__ looks like when it shows a line."""
    run_script(
        """
import asyncio, afork

async def main():
    for f in (afork.Fork.new(), afork.Fork.new_exec()):
        try:
            await f.eval("def fail():\\n    return 1 // 0\\nfail()").ready()
        except afork.RemoteError as exc:
            assert "return 1 // 0" in exc.traceback, exc.traceback
            assert "ZeroDivisionError" in exc.traceback

asyncio.run(main())
"""
    )
