"""eval: code in the process, its arguments, its errors."""

from __future__ import annotations

import asyncio
import os
import traceback

import pytest

import afork

from .scripts.api_ask import ask, read_pipe


@pytest.fixture
def loop_factory():
    """What happens in the process is the same for every kind of loop."""
    return asyncio.new_event_loop


def test_runs_in_main_and_in_order(arun):
    async def main():
        f = afork.Fork.new().eval("x = [__name__]").eval("x.append(2)").eval("x += [3]")
        assert await ask(f, "x") == ["__main__", 2, 3]

    arun(main)


def test_arguments_are_bound_meanwhile(arun):
    async def main():
        f = afork.Fork.new().eval("got = args", "text", b"bytes", "", "ü\udcff")
        f.eval("now = args").eval("later = 'args' in globals()")
        assert await ask(f, "(got, now)") == (("text", b"bytes", "", "ü\udcff"), ())
        # what the code itself has called args stays
        f = afork.Fork.new().eval("args = 1").eval("pass", "x").eval("y = args", "z")
        assert await ask(f, "(y, globals()['args'])") == (("z",), 1)

    arun(main)


def test_code_is_dedented(arun):
    async def main():
        f = afork.Fork.new().eval(
            """
            def double(x):
                return 2 * x
            """
        )
        assert await ask(f, "double(21)") == 42

    arun(main)


def test_futures_of_afork_do_not_leak_into_the_code(arun):
    async def main():
        # annotations are not strings, as they are in afork's own modules
        f = afork.Fork.new().eval("def f(x: 1 + 1): pass")
        assert await ask(f, "f.__annotations__") == {"x": 2}

    arun(main)


def test_error_has_type_message_and_source(arun):
    async def main():
        f = afork.Fork.new().eval(
            """
            def inner():
                raise KeyError("what is missing")
            inner()
            """
        )
        with pytest.raises(afork.RemoteError) as info:
            await f.ready()
        error = info.value
        assert error.stage == "eval"
        assert error.type == "KeyError"
        assert error.message == "'what is missing'"
        assert 'raise KeyError("what is missing")' in error.traceback
        assert "in inner" in error.traceback
        # nothing of ours, from the first line on
        lines = error.traceback.splitlines()
        assert lines[0] == "Traceback (most recent call last):"
        assert lines[1].startswith('  File "<afork eval ')
        assert "_child.py" not in error.traceback
        # and all of it is printed under ours
        text = "".join(traceback.format_exception(error))
        assert "In the process:" in text
        assert 'raise KeyError("what is missing")' in text

    arun(main)


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        ("x = (", "SyntaxError", "'(' was never closed (<afork eval 1>, line 1)"),
        ("import sys; sys.exit(3)", "SystemExit", "3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt", ""),
        ("1 / 0", "ZeroDivisionError", "division by zero"),
        (
            "import json; json.loads('{')",
            "json.decoder.JSONDecodeError",
            "Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1)",
        ),
        (
            "class Bad(Exception):\n  def __str__(self): 1 / 0\nraise Bad",
            "__main__.Bad",
            "<no message: ZeroDivisionError('division by zero')>",
        ),
        ("raise OSError(2, 'gone', 'x')", "FileNotFoundError", "[Errno 2] gone: 'x'"),
        ("raise ValueError('ü\\udcff')", "ValueError", "ü?"),
        ("raise ValueError('\\0')", "ValueError", "\0"),
    ],
)
def test_errors(arun, code, kind, message):
    async def main():
        with pytest.raises(afork.RemoteError) as info:
            await afork.Fork.new().eval(code).ready()
        assert (info.value.type, info.value.message) == (kind, message)
        assert info.value.stage == "eval"

    arun(main)


def test_after_an_error_nothing_is_executed(arun):
    async def main():
        reading, writing = os.pipe()
        f = afork.Fork.new().eval("import os; fd = int(args[0])", str(os.getpid()))
        f.eval("1 / 0").eval("import os; os.mkdir(args[0])", "/nonexistent/x")
        os.close(writing)
        with pytest.raises(afork.RemoteError, match="ZeroDivisionError"):
            await f.ready()
        # the same again, to each who asks; also to processes forked from it
        with pytest.raises(afork.RemoteError, match="ZeroDivisionError"):
            await f.ready()
        child = f.fork()
        with pytest.raises(afork.RemoteError, match="ZeroDivisionError"):
            await child.run("os.getpid")
        with pytest.raises(afork.RemoteError, match="ZeroDivisionError"):
            await f.run("os.getpid")
        assert await read_pipe(reading) == b""

    arun(main)


def test_children_of_a_failed_template_get_its_traceback(arun):
    async def main():
        template = afork.Fork.new_exec().eval("undefined_name")
        one, two = template.fork(), template.fork()
        for f in (one, two):
            with pytest.raises(afork.RemoteError) as info:
                await f.run("os.getpid")
            assert info.value.type == "NameError"
            assert "undefined_name" in info.value.traceback

    arun(main)


def test_death_during_eval_is_worker_lost(arun):
    async def main():
        f = afork.Fork.new().eval("import os; os._exit(5)")
        with pytest.raises(afork.WorkerLost) as info:
            await f.ready()
        assert info.value.pid == f.pid
        assert info.value.status == 5 << 8
        assert f.returncode == 5
        f = afork.Fork.new().eval("import os; os.kill(os.getpid(), 11)")
        with pytest.raises(afork.WorkerLost, match="killed by SIGSEGV") as info:
            await f.run("os.getpid")
        assert info.value.status & 0x7F == 11
        assert f.returncode == -11

    arun(main)


def test_wrong_arguments_are_raised_at_the_call():
    f = afork.Fork.new()
    with pytest.raises(TypeError, match="code must be str, not bytes"):
        f.eval(b"pass")
    with pytest.raises(TypeError, match="str or bytes needed, not int"):
        f.eval("pass", 1)
    with pytest.raises(ValueError, match="frame over the cap of 16777216 bytes"):
        f.eval("pass", b"x" * (16 << 20))
    f.close()


def test_code_may_start_programs_threads_and_handlers(arun):
    async def main():
        f = afork.Fork.new().eval(
            """
            import signal, subprocess, threading
            signal.signal(signal.SIGTERM, lambda *a: seen.append(a[0]))
            seen = []
            done = subprocess.run(["sh", "-c", "exit 3"]).returncode
            thread = threading.Thread(target=seen.append, args=("thread",))
            thread.start(); thread.join()
            """
        )
        g = f.fork()
        assert await ask(g, "(done, seen)") == (3, ["thread"])
        # the process itself ignores the signal, the function that it enters does not
        g = f.fork().eval("signal.raise_signal(signal.SIGTERM)")
        assert await ask(g, "seen") == ["thread"]
        answer = await ask(f.fork(), "(signal.raise_signal(15), seen)")
        assert answer == (None, ["thread", 15])
        f.close()
        assert await f.wait() == 0

    arun(main)


def test_a_thread_that_runs_on_does_not_keep_the_process(arun):
    async def main():
        f = afork.Fork.new().eval(
            """
            import threading
            stop = threading.Event()
            threading.Thread(target=stop.wait).start()
            """
        )
        assert await ask(f.eval("stop.set()"), "1") == 1
        assert await f.wait() == 0

    arun(main)


def test_output_of_eval_is_not_repeated_by_children(run_script):
    done = run_script(
        """
import afork, asyncio
async def main():
    f = afork.Fork.new().eval("print('once', end='')")
    async with f.fork() as a, f.fork() as b:
        await a.ready(); await b.ready()
    async with f: pass
asyncio.run(main())
""",
    )
    assert done.stdout == "once"
    assert done.stderr == ""


def test_eval_sees_site_builtins(arun):
    async def main():
        names = "[n for n in ('exit', 'quit', 'help', 'copyright') if n not in dir(__builtins__)]"
        assert await ask(afork.Fork.new(), names) == []

    arun(main)
