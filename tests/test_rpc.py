"""Fork.rpc: calls of a function in one process, synchronous and asynchronous."""

from __future__ import annotations

import asyncio
import gc
import os
import signal

import pytest

import afork

from .conftest import SCRIPTS
from .scripts.api_ask import PYTHONPATH
from .scripts.rpc_ask import Events, jobs, rpc

__all__ = ["jobs"]


# -- calls


def test_arguments_and_results(arun):
    async def main():
        async with rpc("echo") as f:
            assert await f() == ()
            assert await f(1, "two", b"three", None, [4.0]) == (
                1,
                "two",
                b"three",
                None,
                [4.0],
            )
            assert await f(1, key="word") == ((1,), {"key": "word"})

    arun(main)


def test_calls_are_queued_at_the_call_and_answered_in_order(arun):
    async def main():
        async with rpc("remember") as f:
            calls = [f(n) for n in range(300)]
            finished = []
            for call in calls:
                call.add_done_callback(lambda call: finished.append(call.id))
            results = await asyncio.gather(*calls)
            assert results == [list(range(n + 1)) for n in range(300)]
            await asyncio.sleep(0)
            assert finished == sorted(finished)
            assert len(finished) == 300

    arun(main)


def test_a_function_of_this_module_and_of_a_prepared_process(arun):
    async def main():
        f = (
            afork.Fork.new()
            .eval("def add(a, b): return a + b + offset")
            .eval("offset = 40")
        )
        async with f.rpc("add") as add:
            assert await add(1, 1) == 42
        async with afork.Fork.new().rpc(os.path.join) as join:
            assert await join("a", "b") == "a/b"

    arun(main)


def test_functions_that_cannot_be_imported_are_refused_at_once():
    f = afork.Fork.new()
    with pytest.raises(TypeError, match="lambda"):
        f.rpc(lambda: None)
    with pytest.raises(TypeError, match="function"):
        f.rpc(17)
    f.rpc("os.getpid").kill()
    with pytest.raises(afork.ClosedError):
        f.rpc("os.getpid")


def test_a_large_argument_and_a_large_result(arun):
    async def main():
        async with rpc("double") as f:
            for size in (1 << 10, 256 << 10, 9_000_000):
                assert await f(b"x" * size) == b"x" * (2 * size)

    arun(main)


def test_large_arguments_are_freed_once_the_call_is_answered(arun):
    async def main():
        import rpc_jobs

        events = Events()
        async with rpc("size", on_event=events) as f:
            assert await f(rpc_jobs.TellsItsEnd(b"x" * (1 << 20))) == 1 << 20
            event = await events.get()
            assert event.args == ("freed",)
            assert event.call_id == 0  # outside of the call

    arun(main)


def test_more_than_the_socket_holds(arun):
    async def main():
        async with rpc("echo") as f:
            calls = [f(n, b"x" * 100_000) for n in range(200)]
            for n, call in enumerate(calls):
                assert (await call)[0] == n

    arun(main)


# -- failures of calls


def test_exceptions_keep_type_arguments_notes_and_cause(arun):
    async def main():
        async with rpc("fail") as f:
            with pytest.raises(LookupError) as info:
                await f("LookupError", "a", 2)
            assert info.value.args == ("a", 2)
            assert isinstance(info.value.__cause__, afork.RemoteError)
            assert "rpc_jobs.py" in info.value.__cause__.traceback
            assert "afork/rpc" not in info.value.__cause__.traceback
            for kind in ("SystemExit", "KeyboardInterrupt", "GeneratorExit"):
                with pytest.raises(afork.RemoteError) as lost:
                    await f(kind, 5)
                assert lost.value.type == kind
            assert "Error" in repr(
                await asyncio.gather(f("OSError"), return_exceptions=True)
            )
        async with rpc("fail_with_cause") as f:
            with pytest.raises(ValueError, match="caused") as caused:
                await f()
            assert caused.value.__notes__ == ["a note"]
            assert isinstance(caused.value.__cause__, KeyError)

    arun(main)


def test_what_cannot_be_encoded_fails_that_call(arun):
    async def main():
        async with rpc("unpicklable") as f:
            with pytest.raises(Exception, match=r"pickle|local object"):
                f(lambda: None)
            with pytest.raises(Exception, match=r"pickle|local object"):
                await f()
        async with rpc("event_unpicklable") as f:
            with pytest.raises(Exception, match=r"pickle|local object"):
                await f()
            with pytest.raises(Exception, match=r"pickle|local object"):
                await f()

    arun(main)


def test_a_function_that_is_not_there(arun):
    async def main():
        for name, error in (
            ("no_such_module.f", ModuleNotFoundError),
            ("rpc_jobs.no_such", AttributeError),
            ("rpc_jobs.state", TypeError),
        ):
            f = afork.Fork.new().rpc(name)
            first, second = f(1), f(2)
            for call in (first, second):
                with pytest.raises(error) as info:
                    await call
            if error is ModuleNotFoundError:
                assert str(SCRIPTS) in "".join(info.value.__notes__)
            with pytest.raises(error):
                f(3)
            await f.close()

    arun(main)


def test_an_async_function_needs_to_be_said(arun):
    async def main():
        async with rpc("async_double") as f:
            with pytest.raises(TypeError, match="asynchronous=True"):
                await f(1)

    arun(main)


def test_a_process_that_dies(arun):
    async def main():
        for how, status in (("exit", 3 << 8), ("SIGKILL", 9), ("SIGSEGV", 11)):
            errors = []
            f = rpc("die", on_error=errors.append)
            first, second = f(how), f(how)
            for call in (first, second):
                with pytest.raises(afork.WorkerLost) as info:
                    await call
                assert info.value.pid == f.pid
                assert info.value.status & 0xFF7F == status
            with pytest.raises(afork.WorkerLost):
                f(how)
            await f.close()
            assert [type(e) for e in errors] == [afork.WorkerLost]

    arun(main)


def test_a_process_that_dies_with_calls_unread(arun):
    """The socket has an error then, and libuv watches such a one no longer."""

    async def main():
        f = rpc("die")
        calls = [f("SIGKILL"), *(f("x" * 100_000) for _ in range(50))]
        for call in calls:
            with pytest.raises(afork.WorkerLost):
                await call
        await f.close()

    arun(main)


def test_a_process_that_dies_while_nothing_is_asked(arun, caplog):
    async def main():
        destroyed = asyncio.Event()
        f = rpc("echo", on_destroy=destroyed.set)
        await f()
        os.kill(f.pid, signal.SIGKILL)
        await destroyed.wait()
        assert "killed by SIGKILL" in caplog.text

    arun(main)


def test_a_process_that_could_not_be_forked(arun):
    async def main():
        f = afork.Fork.new().eval("1/0").rpc("os.getpid")
        with pytest.raises(afork.RemoteError, match="ZeroDivisionError"):
            await f()
        await f.close()

    arun(main)


# -- cancelling


def test_a_cancelled_call_that_waits_is_not_begun(arun, tmp_path):
    async def main():
        os.mkfifo(tmp_path / "pipe")
        f = afork.Fork.new().require("rpc_jobs").rpc("rpc_jobs.echo")
        g = (
            afork.Fork.new()
            .eval(
                "import rpc_jobs\n"
                "def either(x): return rpc_jobs.block(x) if isinstance(x, str) else rpc_jobs.remember(x)"
            )
            .rpc("either")
        )
        held = g(str(tmp_path / "pipe"))
        calls = [g(n) for n in range(4)]
        calls[1].cancel()
        calls[2].cancel()
        await f()  # has sent what there was to be sent, meanwhile
        with await asyncio.to_thread(open, tmp_path / "pipe", "wb") as file:
            file.write(b"go on")
        assert await held == b"go on"
        assert await calls[0] == [0]
        assert await calls[3] == [0, 3]
        await f.close()
        await g.close()

    arun(main)


def test_a_cancelled_task_gets_no_answer_and_the_next_call_does(arun, tmp_path):
    async def main():
        os.mkfifo(tmp_path / "pipe")
        f = rpc("block")
        task = asyncio.ensure_future(f(str(tmp_path / "pipe")))
        with await asyncio.to_thread(open, tmp_path / "pipe", "wb"):  # it is at it
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await f(os.devnull) == b""
        await f.close()

    arun(main)


def test_an_asynchronous_call_is_cancelled_in_its_process(arun):
    async def main():
        events = Events()
        async with rpc("async_cancelled", asynchronous=True, on_event=events) as f:
            call = f()
            assert (await events.get()).args == ("begun",)
            call.cancel()
            event = await events.get()
            assert event.args == ("cancelled",)
            assert event.call_id == call.id

    arun(main)


# -- asynchronous processes


def test_asynchronous_calls_run_at_once_and_overtake(arun):
    async def main():
        async with rpc("gate", asynchronous=True) as f:
            waiting = [f(str(n), "wait") for n in range(20)]
            for n in reversed(range(20)):
                await f(str(n), "open")
                assert await waiting[n] == "wait"
                assert not any(call.done() for call in waiting[:n])

    arun(main)


def test_asynchronous_init_errors_and_events(arun):
    async def main():
        events = Events()
        fork = afork.Fork.new().send_arg("a", b"b")
        async with fork.rpc(
            "rpc_jobs.async_state", init="rpc_jobs.async_setup", asynchronous=True
        ) as f:
            assert await f() == [("a", b"b")]
        async with rpc("async_events", asynchronous=True, on_event=events) as f:
            call = f(50)
            assert await call == call.id
            assert events.all() == [("step", n) for n in range(50)]
        async with rpc("fail", asynchronous=True) as f:  # a plain function will do
            with pytest.raises(KeyError):
                await f("KeyError", 1)
        f = rpc("async_event_and_die", asynchronous=True, on_event=events)
        with pytest.raises(afork.WorkerLost):
            await f()
        assert events.all() == [("last words",)]
        await f.close()

    arun(main)


# -- init, done and the end


def test_init_gets_the_pending_arguments(arun):
    async def main():
        r, w = os.pipe()
        fork = afork.Fork.new().send_arg("text", b"bytes").send_fh(r)
        os.close(r)
        os.close(w)
        async with fork.rpc("rpc_jobs.what_state", init="rpc_jobs.setup") as f:
            with pytest.raises(TypeError, match="FileIO"):  # it has arrived
                await f()

    arun(main)


def test_init_that_raises_is_the_error_of_every_call(arun):
    async def main():
        errors = []
        f = rpc("echo", init="rpc_jobs.setup_fails", on_error=errors.append)
        for call in (f(1), f(2)):
            with pytest.raises(LookupError) as info:
                await call
            assert info.value.args == ("setup", 0)
        await f.close()
        assert [type(e) for e in errors] == [LookupError]

    arun(main)


def test_done_is_called_at_the_end(arun, tmp_path):
    async def main():
        path = tmp_path / "done"
        fork = afork.Fork.new().set(env={"RPC_JOBS_DONE": str(path)})
        async with fork.rpc("rpc_jobs.double", done="rpc_jobs.say_done") as f:
            assert await f(4) == 8
            assert not path.exists()
        assert path.read_text() == "done\n"
        assert fork.returncode == 0

    arun(main)


def test_dropping_the_object_lets_calls_finish(arun):
    async def main():
        destroyed = asyncio.Event()
        f = rpc("double", on_destroy=destroyed.set)
        calls = [f(n) for n in range(100)]
        del f
        gc.collect()
        assert await asyncio.gather(*calls) == [2 * n for n in range(100)]
        await destroyed.wait()

    arun(main)


def test_never_used(arun):
    async def main():
        fork = afork.Fork.new()
        f = fork.rpc("os.getpid")
        del f
        assert await fork.wait() == 0
        async with afork.Fork.new().rpc("os.getpid") as g:
            pass
        assert g.fork.returncode == 0
        with pytest.raises(afork.ClosedError):
            g()

    arun(main)


def test_leaving_by_an_exception_kills(arun):
    async def main():
        f, call = rpc("forever"), None

        async def fail():
            nonlocal call
            async with f:
                call = f()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()
        with pytest.raises(afork.WorkerLost):
            await call
        assert f.fork.returncode == -signal.SIGKILL

    arun(main)


def test_cancelled_close_kills(arun):
    async def main():
        f = rpc("forever")
        call = f()
        task = asyncio.create_task(f.close())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(afork.WorkerLost):
            await call
        assert await f.fork.wait() == -signal.SIGKILL

    arun(main)


def test_only_on_the_loop_of_the_first_use(loop_factory):
    with asyncio.Runner(loop_factory=loop_factory) as first:

        async def use():
            f = rpc("double")
            assert await f(1) == 2
            return f

        async def use_again(f):
            with pytest.raises(RuntimeError, match="another event loop"):
                f(1)

        f = first.run(use())
        with asyncio.Runner(loop_factory=loop_factory) as second:
            second.run(use_again(f))
        first.run(f.close())


def test_a_loop_that_ends_in_the_middle(loop_factory):
    async def main():
        f = rpc("forever")
        f()
        g = rpc("echo")
        await g()
        return f, g

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        f, g = runner.run(main())
    del f, g
    gc.collect()


# -- codecs


def test_codecs(arun):
    async def main():
        async with rpc("echo", codec="json") as f:
            assert await f(1, "zwei", [None, {"a": 1.5}]) == [
                1,
                "zwei",
                [None, {"a": 1.5}],
            ]
            with pytest.raises(TypeError):
                f(b"bytes")
        async with rpc("fail", codec="json") as f:
            with pytest.raises(afork.RemoteError, match="LookupError"):
                await f("LookupError")
        async with rpc("echo", codec="bytes") as f:
            assert await f(b"one", bytearray(b"two")) == (b"one", b"two")
            assert await f() == ()
            with pytest.raises(TypeError):
                f("text")
        import rpc_jobs

        async with rpc("echo", codec=rpc_jobs.Reversed) as f:
            assert await f(1, ["x"]) == (1, ["x"])
        with pytest.raises(TypeError):
            rpc("echo", codec=object())

    arun(main)


# -- hostile processes


GARBAGE = """
import os
def garbage(data): os.write(find(), data); import signal; signal.pause()
def find():
    import stat
    for fd in range(3, 64):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode): return fd
        except OSError: pass
"""


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 64,
        b"\0" * 16,
        b"\0\0\0\0\x11\0\0\0" + b"\x63" * 8,
        b"\0\0\0\0\x63\0\0\0" + b"\0" * 8,
    ],
    ids=["garbage", "zeros", "unknown id", "unknown kind"],
)
def test_garbage_from_a_process_ends_it(arun, data):
    async def main():
        f = afork.Fork.new().eval(GARBAGE).rpc("garbage")
        first, second = f(data), f(b"")
        for call in (first, second):
            with pytest.raises(afork.ProtocolError):
                await call
        await f.close()
        assert f.fork.returncode == -signal.SIGKILL

    arun(main)


def test_functions_of_the_main_program(run_script, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        """
import asyncio, afork

class Thing:
    def __init__(self, n): self.n = n

def work(thing):
    return Thing(thing.n + 1)

def fails():
    raise Thing.Error("mine")

class Error(Exception): pass
Thing.Error = Error

async def main():
    async with afork.Fork.new().rpc(work) as f:
        assert (await f(Thing(1))).n == 2
    async with afork.Fork.new().rpc(fails) as f:
        try:
            await f()
        except Error as exc:
            assert exc.args == ("mine",)
    async with afork.Fork.new().rpc("operator.attrgetter") as f:
        pass

if __name__ == "__main__":
    asyncio.run(main())
    print("good")
"""
    )
    assert run_script(
        str(script), cwd=tmp_path, env={**os.environ, "PYTHONPATH": PYTHONPATH}
    ).stdout


def test_the_guard_is_asked_for(run_script, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        """
import asyncio, afork

def work(): pass

async def main():
    async with afork.Fork.new().rpc(work) as f:
        await f()

try:
    asyncio.run(main())
except Exception as exc:
    print(exc)
"""
    )
    done = run_script(
        str(script), cwd=tmp_path, env={**os.environ, "PYTHONPATH": PYTHONPATH}
    )
    assert 'if __name__ == "__main__":' in done.stdout + done.stderr
