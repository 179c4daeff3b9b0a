"""run: a function in a process of its own, and a socket to it."""

from __future__ import annotations

import asyncio
import collections.abc
import functools
import gc
import logging
import os
import signal
import socket
import stat
import sys
import warnings

import pytest

import afork

from .conftest import read_all
from .scripts.api_ask import PYTHONPATH, ask, ended, read_pipe

SHOW = """
def show(sock, *args):
    sock.sendall(repr(args).encode())
"""


def test_arguments_arrive_in_order_and_as_sent(arun):
    async def main():
        f = (
            afork.Fork.new()
            .eval(SHOW)
            .send_arg("text", b"bytes", "")
            .send_arg("ü\udcff")
        )
        return await read_all(await f.run("show"))

    assert arun(main) == repr(("text", b"bytes", "", "ü\udcff")).encode()


def test_unknown_function_is_raised_at_the_await(arun):
    async def main():
        with pytest.raises(afork.RemoteError, match="AttributeError") as info:
            await afork.Fork.new().run("os.no_such_function")
        assert info.value.stage == "run"
        with pytest.raises(afork.RemoteError, match="no_such_module"):
            await afork.Fork.new().run("no_such_module.f")
        # and the template has not suffered
        assert await read_all(await afork.Fork.new().eval(SHOW).run("show")) == b"()"

    arun(main)


def test_cancelling_the_await_kills_the_process(arun):
    async def main():
        f = afork.Fork.new().eval("import time; time.sleep(60)")
        task = asyncio.create_task(f.run("os.getpid"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await f.wait() == -9

    arun(main)


def test_not_awaited_runs_all_the_same(arun):
    async def main():
        r, w = os.pipe()
        afork.Fork.new().send_fh(w).eval(
            "def f(sock, out): out.write(b'done:' + sock.recv(9))"
        ).run("f")
        os.close(w)
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(r, "rb", 0)
        )
        assert await reader.read() == b"done:"
        transport.close()

    arun(main)


# -- what can be run


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """A module of functions to be run, importable here and there."""
    (tmp_path / "api_worker.py").write_text(
        """
import asyncio, functools, sys

def f(sock, *args):
    sock.sendall(repr((__name__, args)).encode())

async def coroutine(sock, *args):
    await asyncio.sleep(0)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_sendall(sock, b"async")

class C:
    def __init__(self, sock, *args):
        sock.sendall(b"init")
    @classmethod
    def method(cls, sock, *args):
        sock.sendall(cls.__name__.encode())
    @staticmethod
    def static(sock):
        sock.sendall(b"static")
    def bound(self, sock):
        pass
    class Inner:
        @staticmethod
        def g(sock):
            sock.sendall(b"inner")

def decorate(g):
    @functools.wraps(g)
    def wrapper(sock, *args):
        sock.sendall(b"decorated ")
        g(sock, *args)
    return wrapper

@decorate
def decorated(sock):
    sock.sendall(b"function")

def closure():
    def inside(sock):
        pass
    return inside

lam = lambda sock: None
not_callable = 3
instance = C(type("S", (), {"sendall": lambda self, data: None})())
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import api_worker

    yield api_worker
    del sys.modules["api_worker"]


def test_names(arun, worker):
    async def main():
        for name, answer in (
            ("api_worker.f", b"('api_worker', ())"),
            ("api_worker:f", b"('api_worker', ())"),
            ("api_worker.C.Inner.g", b"inner"),
            ("api_worker:C.Inner.g", b"inner"),
            ("api_worker.C", b"init"),
            ("api_worker.C.method", b"C"),
            ("api_worker.coroutine", b"async"),
        ):
            assert await read_all(await afork.Fork.new().run(name)) == answer
        f = afork.Fork.new().eval("from api_worker import f as g, C")
        assert await read_all(await f.fork().run("g")) == b"('api_worker', ())"
        assert await read_all(await f.fork().run("__main__.C.static")) == b"static"
        assert await read_all(await f.fork().run("__main__.g")) == b"('api_worker', ())"
        assert await read_all(await f.fork().run("__main__:C.static")) == b"static"

    arun(main)


def test_callables(arun, worker):
    async def main():
        for func, answer in (
            (worker.f, b"('api_worker', ())"),
            (worker.coroutine, b"async"),
            (worker.C, b"init"),
            (worker.C.method, b"C"),
            (worker.C.static, b"static"),
            (worker.C.Inner.g, b"inner"),
            (worker.decorated, b"decorated function"),
        ):
            assert await read_all(await afork.Fork.new().run(func)) == answer

    arun(main)


def test_what_cannot_be_imported_is_refused_at_the_call(worker):
    f = afork.Fork.new()
    for wrong, match in (
        (lambda sock: None, "lambdas and functions inside functions exist only here"),
        (worker.lam, "lambdas"),
        (worker.closure(), "functions inside functions"),
        (worker.instance.bound, "the process would run something else"),
        (functools.partial(worker.f), "has no name to import it by"),
        (worker.instance, "needed, not C"),
        (3, "a function or its name is needed, not int"),
        (None, "not NoneType"),
        (b"api_worker.f", "not bytes"),
    ):
        with pytest.raises(TypeError, match=match):
            f.run(wrong)
    for wrong in ("", "a\0b"):
        with pytest.raises(ValueError, match="not the name of a function"):
            f.run(wrong)
    # replaced in its module: another object has the name
    old, worker.f = worker.f, worker.decorated
    with pytest.raises(TypeError, match="the process would run something else"):
        f.run(old)
    f.close()


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("nothing", "AttributeError", "nothing"),
        ("nothing.f", "ModuleNotFoundError", "No module named 'nothing'"),
        ("nothing:f", "ModuleNotFoundError", "No module named 'nothing'"),
        ("api_worker.g", "AttributeError", "has no attribute 'g'"),
        ("api_worker.C.nothing", "AttributeError", "has no attribute 'nothing'"),
        (
            "api_worker.not_callable",
            "TypeError",
            "'api_worker.not_callable' is not callable",
        ),
        ("os.path.nothing", "AttributeError", "has no attribute 'nothing'"),
        (".", "AttributeError", ""),
        ("a..b", "", ""),
        ("api_worker.", "AttributeError", ""),
    ],
)
def test_names_that_mean_nothing(arun, worker, name, kind, text):
    async def main():
        with pytest.raises(afork.RemoteError) as info:
            await afork.Fork.new().run(name)
        assert info.value.stage == "run"
        if kind:
            assert info.value.type == kind
        assert text in info.value.message

    arun(main)


def test_module_whose_import_fails_says_so(arun, tmp_path, monkeypatch):
    (tmp_path / "api_needs.py").write_text("import api_absent\ndef f(sock): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    async def main():
        with pytest.raises(afork.RemoteError) as info:
            await afork.Fork.new().run("api_needs.f")
        assert info.value.type == "ModuleNotFoundError"
        assert info.value.message == "No module named 'api_absent'"
        assert 'api_needs.py", line 1' in info.value.traceback

    arun(main)


# -- the main program's functions

MAIN = """
import asyncio, sys
import afork

seen = "main loaded as " + __name__

def work(sock, *args):
    sock.sendall(f"{__name__} {seen!r} {args}".encode())

class Deep:
    @staticmethod
    def work(sock, *args):
        sock.sendall(f"{Deep.__module__} deep".encode())

async def main():
    loop = asyncio.get_running_loop()
    for f in (afork.Fork.new().send_arg("x"), afork.Fork.new_exec()):
        for func in (work, Deep.work):
            sock = await f.fork().run(func)
            print((await loop.sock_recv(sock, 999)).decode())
            sock.close()

if __name__ == "__main__":
    asyncio.run(main())
"""
EXPECTED = """\
__mp_main__ 'main loaded as __mp_main__' ('x',)
__mp_main__ deep
__mp_main__ 'main loaded as __mp_main__' ()
__mp_main__ deep
"""


def run_python(*args: str, **kwargs):
    import subprocess

    return subprocess.run(
        [sys.executable, "-W", "error", *args],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        **kwargs,
    )


def test_functions_of_the_main_file(tmp_path):
    (tmp_path / "prog.py").write_text(MAIN)
    for path in (str(tmp_path / "prog.py"), "prog.py"):
        done = run_python(path, cwd=tmp_path)
        assert (done.stdout, done.stderr) == (EXPECTED, "")


def test_functions_of_a_main_module(tmp_path):
    package = tmp_path / "api_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("name = 'main loaded as '\n")
    (package / "__main__.py").write_text(
        "from .helper import name\n" + MAIN.replace('"main loaded as "', "name")
    )
    (package / "prog.py").write_text(
        "from .helper import name\n" + MAIN.replace('"main loaded as "', "name")
    )
    for module in ("api_package", "api_package.prog"):
        done = run_python("-m", module, cwd=tmp_path)
        assert (done.stdout, done.stderr) == (EXPECTED, "")


def test_functions_of_a_main_folder(tmp_path):
    (tmp_path / "__main__.py").write_text(MAIN)
    done = run_python(str(tmp_path))
    assert (done.stdout, done.stderr) == (EXPECTED, "")


def test_functions_of_a_main_that_has_no_file(run_script):
    done = run_script(
        """
import afork
def work(sock): pass
f = afork.Fork.new()
try:
    f.run(work)
except TypeError as exc:
    print(exc)
f.close()
"""
    )
    assert "can only be run when it is a file or a module" in done.stdout


def test_a_main_program_that_was_piped(tmp_path):
    text = MAIN.replace("asyncio.run(main())", "afork.Fork.new().run(work)")
    done = run_python("-", input=text, cwd=tmp_path)
    assert done.stderr.splitlines()[-1].startswith("TypeError: functions of __main__")
    assert "read from standard input" in done.stderr


@pytest.mark.parametrize("how", ["path", "name"])
def test_the_arguments_of_the_main_program(tmp_path, how):
    text = MAIN.replace('"main loaded as " + __name__', "sys.argv[1:]")
    (tmp_path / "prog.py").write_text(text)
    source = ["prog.py"] if how == "path" else ["-m", "prog"]
    done = run_python(*source, "a b", "\udcff", cwd=tmp_path)
    wanted = EXPECTED.replace("'main loaded as __mp_main__'", r"['a b', '\udcff']")
    assert (done.stdout, done.stderr) == (wanted, "")


def test_main_file_without_a_guard_says_what_is_wrong(tmp_path):
    (tmp_path / "prog.py").write_text(
        MAIN.replace('if __name__ == "__main__":\n    asyncio', "asyncio")
    )
    done = run_python(str(tmp_path / "prog.py"))
    assert done.returncode == 1
    assert "afork._errors.RemoteError: set: RuntimeError: work is run by" in done.stderr
    assert 'put it under if __name__ == "__main__":' in done.stderr


def test_error_in_the_main_file_is_raised_at_the_await(tmp_path):
    (tmp_path / "prog.py").write_text(
        MAIN.replace("seen =", "if __name__ != '__main__': 1 / 0\nseen =")
    )
    done = run_python(str(tmp_path / "prog.py"))
    assert done.returncode == 1
    assert "ZeroDivisionError: division by zero" in done.stderr
    assert 'prog.py", line 5' in done.stderr


# -- the awaitable


def test_is_a_coroutine_queued_at_the_call(arun):
    async def main():
        r, w = os.pipe()
        f = afork.Fork.new().send_fh(w).eval("def f(sock, out): out.write(b'ran')")
        os.close(w)
        run = f.run("f")
        assert isinstance(run, collections.abc.Coroutine)
        assert asyncio.iscoroutine(run)
        assert repr(run).startswith("<afork run pid=")
        # it runs although nobody awaits
        assert await read_pipe(r) == b"ran"
        (await run).close()

    arun(main)


def test_task_gather_wait_for_and_group(arun):
    async def main():
        def new():
            return afork.Fork.new().eval(SHOW)

        assert await read_all(await asyncio.create_task(new().run("show"))) == b"()"
        for sock in await asyncio.gather(*(new().run("show") for _ in range(3))):
            assert await read_all(sock) == b"()"
        sock = await asyncio.wait_for(new().run("show"), 10)
        assert await read_all(sock) == b"()"
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(new().run("show")) for _ in range(3)]
        for task in tasks:
            assert await read_all(task.result()) == b"()"

    arun(main)


def test_cannot_be_awaited_twice(arun):
    async def main():
        run = afork.Fork.new().eval(SHOW).run("show")
        (await run).close()
        with pytest.raises(RuntimeError, match="cannot be awaited twice"):
            await run

    arun(main)


def test_our_end_is_a_nonblocking_stream_socket_of_ours(arun):
    async def main():
        sock = await afork.Fork.new().eval(SHOW).run("show")
        assert type(sock) is socket.socket
        assert (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_STREAM)
        assert sock.gettimeout() == 0
        assert not os.get_inheritable(sock.fileno())
        assert stat.S_ISSOCK(os.fstat(sock.fileno()).st_mode)
        await read_all(sock)

    arun(main)


def test_the_other_end_is_blocking_and_alone(arun):
    async def main():
        what = "(type(sock).__name__, sock.gettimeout(), os.get_blocking(sock.fileno()), os.get_inheritable(sock.fileno()), int(sock.type))"
        answer = await ask(afork.Fork.new(), what)
        assert answer == ("socket", None, True, False, socket.SOCK_STREAM)

    arun(main)


def test_streams_over_the_socket(arun):
    async def main():
        f = afork.Fork.new().eval(
            """
            def echo(sock):
                with sock.makefile("rwb", 0) as file:
                    for line in file:
                        file.write(line.upper())
            """
        )
        reader, writer = await asyncio.open_unix_connection(sock=await f.run("echo"))
        for n in range(3):
            writer.write(b"line %d\n" % n)
            assert await reader.readline() == b"LINE %d\n" % n
        writer.close()
        await writer.wait_closed()
        assert await f.wait() == 0

    arun(main)


def test_bytes_written_before_the_function_reads_are_its_own(arun):
    """Never read past the report that the function was entered."""

    async def main():
        f = afork.Fork.new().eval(
            """
            def first(sock):
                sock.sendall(b"x" * 100000)
                sock.sendall(sock.recv(5, 0x100))
            """
        )
        sock = await f.run("first")
        await asyncio.get_running_loop().sock_sendall(sock, b"12345")
        data = await read_all(sock)
        assert data == b"x" * 100000 + b"12345"

    arun(main)


def test_fork_may_go_before_the_await_is_over(arun):
    async def main():
        assert await read_all(await afork.Fork.new().eval(SHOW).run("show")) == b"()"
        run = afork.Fork.new().eval(SHOW).run("show")
        gc.collect()
        assert await read_all(await run) == b"()"

    arun(main)


# -- callback


def test_callback(arun):
    async def main():
        got = asyncio.get_running_loop().create_future()
        afork.Fork.new().eval(SHOW).run("show", got.set_result)
        assert await read_all(await got) == b"()"
        # also as a keyword; the await then has no socket to give
        got = asyncio.get_running_loop().create_future()
        run = afork.Fork.new().eval(SHOW).run("show", callback=got.set_result)
        with pytest.raises(asyncio.InvalidStateError, match="given to the callback"):
            await run
        assert await read_all(await got) == b"()"

    arun(main)


def test_callback_is_not_called_on_failure(arun, caplog):
    async def main():
        called = []
        f = afork.Fork.new()
        f.run("nothing.f", called.append)
        assert await f.wait() == 0
        assert called == []

    arun(main)
    assert [r.name for r in caplog.records] == ["afork"]


def test_exception_in_callback_goes_to_the_loop(arun):
    async def main():
        loop = asyncio.get_running_loop()
        seen = loop.create_future()
        loop.set_exception_handler(lambda loop, context: seen.set_result(context))

        def callback(sock):
            sock.close()
            raise LookupError("in callback")

        afork.Fork.new().eval(SHOW).run("show", callback)
        assert str((await seen)["exception"]) == "in callback"

    arun(main)


# -- configure and forget


def test_error_nobody_awaits_is_logged_once(arun, caplog):
    async def main():
        f = afork.Fork.new()
        f.run("nothing_there.f")
        await f.wait()
        gc.collect()
        del f
        gc.collect()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arun(main)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("afork", logging.ERROR)
    assert "No module named 'nothing_there'" in record.getMessage()


def test_error_that_was_awaited_is_not_logged(arun, caplog):
    async def main():
        with pytest.raises(afork.RemoteError):
            await afork.Fork.new().run("nothing_there.f")

    arun(main)
    gc.collect()
    assert caplog.records == []


def test_our_end_is_closed_when_nobody_awaits(arun):
    async def main():
        r, w = os.pipe()
        f = afork.Fork.new().send_fh(w)
        os.close(w)
        f.eval(
            """
            def f(sock, out):
                out.write(b"eof" if sock.recv(1) == b"" else b"data")
            """
        ).run("f")
        assert await read_pipe(r) == b"eof"
        assert await f.wait() == 0

    arun(main)


def test_forgetting_many_keeps_nothing(arun):
    async def main():
        template = await afork.Fork.new_exec().ready()
        before = len(os.listdir("/proc/self/fd"))
        for f in (processes := template.fork_many(50)):
            f.run("os.getpid")
        for f in processes:
            await f.wait()
        del f, processes
        await template.ready()
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before
        template.close()

    arun(main)


# -- the end of a worker


def outcome(run_script, code: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a worker that runs code."""
    done = run_script(
        f"""
import asyncio, sys, afork
async def main():
    f = afork.Fork.new_exec().fork().eval({code!r})
    sock = await f.run("f")
    print(await f.wait())
    sock.close()
asyncio.run(main())
""",
    )
    *output, code = done.stdout.splitlines()
    return int(code), "\n".join(output), done.stderr


@pytest.mark.parametrize(
    ("statement", "code", "errors"),
    [
        ("return 7", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(None)", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit(256)", 0, ""),
        ("sys.exit(-1)", 255, ""),
        ("sys.exit(True)", 1, ""),
        ("sys.exit('why')", 1, "why\n"),
        ("sys.exit(('a', 1))", 1, "('a', 1)\n"),
        ("raise SystemExit(4)", 4, ""),
        ("os._exit(9)", 9, ""),
        ("os.kill(os.getpid(), 15)", -15, ""),
        ("os.abort()", -6, ""),
    ],
)
def test_exit_codes_are_pythons(run_script, statement, code, errors):
    source = f"def f(sock):\n    import os, sys\n    {statement}\n"
    assert outcome(run_script, source) == (code, "", errors)


def test_exception_is_a_traceback_on_stderr(run_script):
    source = "def f(sock):\n    inner()\ndef inner():\n    raise LookupError('ü')\n"
    code, output, errors = outcome(run_script, source)
    assert (code, output) == (1, "")
    lines = errors.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1].startswith('  File "<afork eval 1>", line 2, in f')
    assert "    raise LookupError('ü')" in lines
    assert lines[-1] == "LookupError: ü"
    assert "afork/" not in errors


def test_exceptions_are_pythons_own_with_causes_and_groups(run_script):
    source = """
def f(sock):
    try:
        1 / 0
    except ZeroDivisionError as exc:
        raise ExceptionGroup("several", [ValueError(1)]) from exc
"""
    code, _, errors = outcome(run_script, source)
    assert code == 1
    assert "ZeroDivisionError: division by zero" in errors
    assert "The above exception was the direct cause" in errors
    assert "ExceptionGroup: several (1 sub-exception)" in errors


def test_keyboard_interrupt_in_a_worker(run_script):
    source = "def f(sock):\n    import signal\n    signal.raise_signal(signal.SIGINT)\n"
    code, _, errors = outcome(run_script, source)
    # as a Python program that is interrupted: by the signal, or with 130 or 1
    assert code == 1
    assert errors.endswith("KeyboardInterrupt\n")


def test_async_worker(run_script):
    source = """
async def f(sock):
    import asyncio, sys
    await asyncio.sleep(0)
    print("ran in", type(asyncio.get_running_loop()).__module__.split(".")[0])
    sys.exit(6)
"""
    assert outcome(run_script, source) == (6, "ran in asyncio", "")
    source = "async def f(sock):\n    raise LookupError('in coroutine')\n"
    code, _, errors = outcome(run_script, source)
    assert code == 1
    assert errors.endswith("LookupError: in coroutine\n")


def test_exit_handlers_own_run_inherited_do_not(run_script):
    done = run_script(
        """
import asyncio, afork, atexit
async def main():
    template = afork.Fork.new_exec().eval(
        "import atexit; atexit.register(print, 'template handler', flush=True)")
    f = template.fork().eval('''
def f(sock):
    import atexit
    atexit.register(print, "second")
    atexit.register(print, "first")
''')
    (await f.run("f")).close()
    print(await f.wait(), flush=True)
    async with template: pass
asyncio.run(main())
"""
    )
    # the template's own run in the template, which ends as a Python ends
    assert done.stdout == "first\nsecond\n0\ntemplate handler\n"


def test_threads_are_joined_and_daemons_are_not(run_script):
    source = """
def f(sock):
    import threading, signal
    go = threading.Event()
    def work():
        go.wait()
        print("thread done")
    threading.Thread(target=work).start()
    threading.Thread(target=signal.pause, daemon=True).start()
    go.set()
"""
    assert outcome(run_script, source) == (0, "thread done", "")


def test_output_is_flushed(run_script):
    source = """
def f(sock):
    import sys
    sys.stdout.write("out" * 5000)
    sys.stderr.write("err")
    sys.stdout.write("\\n")
"""
    assert outcome(run_script, source) == (0, "out" * 5000, "err")


@pytest.mark.parametrize(
    "statement", ["sys.stdout = None", "sys.stdout.close()", "os.close(1)"]
)
def test_output_that_is_gone_does_no_harm(run_script, statement):
    source = f"def f(sock):\n    import os, sys\n    {statement}\n"
    code, _, errors = outcome(run_script, source)
    assert code == 0
    assert errors == ""


def test_destructors_of_the_template_do_not_run_in_workers(run_script):
    source = """
class D:
    def __del__(self): print("destroyed", flush=True)
d = D()
def f(sock): pass
"""
    assert outcome(run_script, source) == (0, "", "")


def test_worker_is_single_and_clean(arun):
    async def main():
        what = "(os.listdir('/proc/self/task') == [str(os.getpid())], __name__, sys.argv, sys._getframe().f_code.co_name)"
        answer = await ask(afork.Fork.new(), what)
        assert answer == (True, "__main__", ["-c"], "_answer")

    arun(main)


def test_cancelled_before_its_first_step(arun):
    async def main():
        f = afork.Fork.new().eval("import signal; signal.pause()")
        task = asyncio.create_task(f.run("os.getpid"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await f.wait() == -9

    arun(main)


def test_timeout_kills(arun):
    async def main():
        f = await afork.Fork.new().eval("import signal").ready()
        f.eval("signal.pause()")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await f.run("os.getpid")
        assert ended(f.pid)
        assert await f.wait() == -signal.SIGKILL

    arun(main)


def test_everything_after_run_is_refused(arun):
    async def main():
        f = afork.Fork.new()
        (await f.run("os.getpid")).close()
        for call in (
            lambda: f.run("os.getpid"),
            lambda: f.exec("true"),
            lambda: f.eval("1"),
            lambda: f.require("os"),
            lambda: f.send_arg("x"),
            lambda: f.send_fh(0),
            lambda: f.set(umask=0),
            f.fork,
        ):
            with pytest.raises(afork.ClosedError, match="after run"):
                call()
        for call in (f.ready, f.to_fh):
            with pytest.raises(afork.ClosedError, match="after run"):
                await call()
        f.close()
        await f.wait()

    arun(main)


def test_wrong_number_of_arguments_is_the_workers_error(run_script):
    code, _, errors = outcome(run_script, "def f():\n    pass\n")
    assert code == 1
    assert errors.endswith("takes 0 positional arguments but 1 was given\n")


def test_long_names(arun):
    async def main():
        name = "name" * 250
        f = afork.Fork.new().eval(f"def {name}(sock): sock.sendall(b'long')")
        assert await read_all(await f.run(name)) == b"long"

    arun(main)
