"""Pool: output captured of a call, above all of one that has crashed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import pickle
import resource
import subprocess

import pytest

import afork
from afork.rpc import _fdstore

from .conftest import open_descriptors
from .scripts.fault_tools import log  # noqa: F401 - a fixture
from .scripts.pool_tools import Seen, turn

DIE = ("os._exit", "SIGSEGV", "SIGKILL", "overflow", "exec")


@pytest.fixture
def loop_factory():
    """One kind will do: what is tested here is not about the loop."""
    return asyncio.new_event_loop


async def failure(call, kind=afork.WorkerLost):
    """The error of a call that has to fail."""
    with pytest.raises(kind) as info:
        await call
    return info.value


def notes(error):
    return getattr(error, "__notes__", [])


@pytest.mark.parametrize("how", DIE)
def test_a_crash(arun, jobs, how):
    """What Python, C and programs have written until then, line by line."""

    async def main():
        async with afork.Pool(max=1) as pool:
            view = pool.with_options(capture=True)
            error = await failure(view.call(jobs.write_and_crash, how))
            assert error.captured == afork.Captured(
                None, b"python\nwrite\nprogram\n", b"error\nunfinished", False
            )
            assert notes(error) == [
                "stdout of the call:\npython\nwrite\nprogram",
                "stderr of the call:\nerror\nunfinished",
            ]
            again = pickle.loads(pickle.dumps(error))
            assert again.captured == error.captured
            assert again.pid == error.pid
            after = await view.call(jobs.write, "x")
            assert after == afork.Captured("x", b"x out\n", b"x err\n")

    arun(main)


def test_a_crash_that_wrote_nothing(arun, jobs):
    async def main():
        async with afork.Pool(max=1) as pool:
            view = pool.with_options(capture=True)
            error = await failure(view.call(jobs.crash, "SIGKILL"))
            assert error.captured == afork.Captured(None, b"", b"")
            assert notes(error) == []

    arun(main)


def test_a_crash_while_the_result_is_encoded(arun, jobs):
    async def main():
        async with afork.Pool(max=1) as pool:
            view = pool.with_options(capture=True)
            error = await failure(view.call(jobs.write_and_return, "SIGSEGV"))
            assert error.captured == afork.Captured(
                None, b"SIGSEGV out\n", b"SIGSEGV err\n"
            )

    arun(main)


def test_output_of_other_calls(arun, jobs):
    """Neither that of calls before in the same process, nor of those behind."""

    async def main():
        async with afork.Pool(max=1, load=4) as pool:
            view = pool.with_options(capture=True)
            before = [view.call(jobs.write, f"before {i}") for i in range(3)]
            crash = view.call(jobs.write_and_crash, "os._exit")
            behind = [view.call(jobs.write, f"behind {i}") for i in range(3)]
            error = await failure(crash)
            assert error.captured.stdout == b"python\nwrite\nprogram\n"
            for name, calls in ("before", before), ("behind", behind):
                for i, call in enumerate(calls):
                    assert (await call).stdout == f"{name} {i} out\n".encode()
            # Not captured: nothing of the calls before.
            error = await failure(pool.call(jobs.crash, "os._exit"))
            assert error.captured is None
            await view.call(jobs.write, "once more")
            error = await failure(pool.call(jobs.crash, "os._exit"))
            assert error.captured is None
            assert notes(error) == []

    arun(main)


def test_a_program_left_behind(arun, jobs, gate):
    """It still writes to the file of its own call."""

    async def main():
        async with afork.Pool(max=1) as pool:
            view = pool.with_options(capture=True)
            await view.call(jobs.leave_program, gate.path)
            crash = view.call(jobs.free_program_and_crash, gate.path)
            error = await failure(crash)
            assert error.captured == afork.Captured(None, b"second\n", b"")

    arun(main)


def test_a_child_that_comes_back(arun, jobs):
    """The files are those of the call that its parent still runs."""

    async def main():
        async with afork.Pool(max=1) as pool:
            view = pool.with_options(capture=True)
            error = await failure(view.call(jobs.fork_return_and_crash))
            assert error.captured == afork.Captured(None, b"child\nparent\n", b"")

    arun(main)


def test_only_the_last_attempt(arun, jobs, tmp_path):
    path = str(tmp_path / "attempts")

    async def main():
        async with afork.Pool(max=1) as pool:
            view = pool.with_options(capture=True, retries=1)
            good = await view.call(jobs.write_and_crash_at_first, path)
            assert good == afork.Captured(2, b"attempt 2\n", b"")
            view = pool.with_options(capture=True, retries=2)
            error = await failure(view.call(jobs.write_and_crash, "SIGKILL"))
            assert error.captured.stdout == b"python\nwrite\nprogram\n"
            assert len(notes(error)) == 2

    arun(main)


@pytest.mark.parametrize("retries", [0, 1])
def test_killed_after_its_time(arun, jobs, gate, retries):
    """What a call that hangs has written tells where."""

    async def main():
        seen = Seen()
        async with afork.Pool(max=1, on_event=seen) as pool:
            view = pool.with_options(
                capture=True,
                timeout=3600,
                retries=retries,
                retry_on=(TimeoutError,),
            )
            call = view.call(jobs.write_and_block, gate.path)
            for attempt in range(retries + 1):
                await seen.held(attempt + 1)
                call.connection._overdue(call)  # what the timer calls
            error = await failure(call, TimeoutError)
            assert error.captured == afork.Captured(None, b"so far\n", b"")
            assert notes(error)[-1] == "stdout of the call:\nso far"

    arun(main)


def test_a_stream(arun, jobs):
    async def main():
        async with afork.Pool(max=1) as pool:
            stream = pool.with_options(capture=True).stream(
                jobs.write_items_and_crash, 3
            )
            for i in range(3):
                assert await anext(stream) == i
            error = await failure(anext(stream))
            assert error.captured.stdout == b"0\n1\n2\n"

    arun(main)


def test_big_output_keeps_its_end(arun, jobs):
    async def main():
        async with afork.Pool(max=1) as pool:
            view = pool.with_options(capture=True)
            error = await failure(view.call(jobs.write_and_crash, "SIGKILL", 17 << 20))
            captured = error.captured
            assert captured.truncated is True
            assert len(captured.stdout) == 16 << 20
            assert captured.stdout.endswith(b"\npython\nwrite\nprogram\n")
            assert captured.stderr == b"error\nunfinished"
            assert len(notes(error)[0]) <= 4096 + 100

    arun(main)


def test_an_exception_keeps_its_own(arun, jobs):
    """CalledProcessError has a stdout as well: the program's."""

    async def main():
        async with afork.Pool(max=1) as pool:
            call = pool.with_options(capture=True).call(jobs.write_and_check)
            error = await failure(call, subprocess.CalledProcessError)
            assert error.stdout == b"program\n"
            assert error.captured == afork.Captured(None, b"function\n", b"")
            assert notes(error)[-1] == "stdout of the call:\nfunction"

    arun(main)


# -- what it costs, and what is not there


def test_no_descriptor_stays(arun, jobs):
    async def main():
        async with afork.Pool(max=1, load=8) as pool:
            await pool.call(jobs.pid)
            before = open_descriptors()
            view = pool.with_options(capture=True)
            await asyncio.gather(*(view.call(jobs.write, str(i)) for i in range(20)))
            # One for the process, not for each call.
            assert len(open_descriptors()) == len(before) + 1
            await failure(view.call(jobs.write_and_crash, "SIGKILL"))
            await pool.call(jobs.pid)
            assert len(open_descriptors()) == len(before)
            here = await pool.call(jobs.descriptors)
            await view.call(jobs.write, "x")
            assert await pool.call(jobs.descriptors) == here + 2
            await view.call(jobs.write, "x")
            assert await pool.call(jobs.descriptors) == here + 2

    arun(main)


def test_no_descriptor_left_here(arun, jobs):
    """Calls are captured all the same, but a crash loses it."""

    async def main():
        async with afork.Pool(max=1, stderr=None) as pool:
            view = pool.with_options(capture=True)
            await pool.call(jobs.pid)
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)
            top = max(open_descriptors()) + 1
            resource.setrlimit(resource.RLIMIT_NOFILE, (top, limit[1]))
            fillers = []
            try:
                with contextlib.suppress(OSError):
                    while True:
                        fillers.append(os.dup(0))
                assert (await view.call(jobs.write, "x")).stdout == b"x out\n"
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limit)
                for fd in fillers:
                    os.close(fd)
            # The next one tries again.
            error = await failure(view.call(jobs.write_and_crash, "SIGKILL"))
            assert error.captured.stdout == b"python\nwrite\nprogram\n"

    arun(main)


def test_no_descriptor_left_at_the_end(arun, jobs, monkeypatch):
    """That the process has died is told all the same."""

    async def main():
        async with afork.Pool(max=1) as pool:
            view = pool.with_options(capture=True)
            await view.call(jobs.write, "x")

            def take(self, wanted):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

            monkeypatch.setattr(_fdstore.FdStore, "_take", take)
            error = await failure(view.call(jobs.write_and_crash, "SIGKILL"))
            assert error.captured is None

    arun(main)


def test_closed_by_the_function(arun, jobs):
    async def main():
        async with afork.Pool(max=1) as pool:
            view = pool.with_options(capture=True)
            await view.call(jobs.write, "x")
            await view.call(jobs.close_sockets)
            assert (await view.call(jobs.write, "x")).stdout == b"x out\n"
            error = await failure(view.call(jobs.write_and_crash, "SIGKILL"))
            assert error.captured is None

    arun(main)


@pytest.mark.parametrize("what", ["pipe", "file", "nothing", "one", "text", "many"])
def test_what_is_not_to_be_kept(arun, jobs, what):
    """A process that puts other things there only loses its output."""

    async def main():
        async with afork.Pool(max=1) as pool:
            view = pool.with_options(capture=True)
            await view.call(jobs.write, "x")
            before = open_descriptors()
            error = await failure(view.call(jobs.keep_other_things, what))
            if what == "many":  # of which only two are taken
                assert error.captured == afork.Captured(None, b"", b"")
            else:
                assert error.captured is None
            assert await pool.call(jobs.add, 1) == 1
            assert len(open_descriptors()) <= len(before)

    arun(main)


# -- the end


def fill(fd):
    """Write until nothing more fits; how much it was."""
    os.set_blocking(fd, False)
    size = 0
    try:
        while True:
            size += os.write(fd, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(fd, True)
    return size


def test_close_waits_for_a_slow_descriptor(arun, jobs):
    """The loop may end then, and with it whoever writes."""

    async def main():
        r, w = os.pipe()
        full = fill(w)
        template = afork.Fork.new()
        pool = afork.Pool(template=template, max=1, stdout=w)
        await pool.call(os.write, 1, b"late\n")
        closing = asyncio.create_task(pool.close())
        while pool.stats().pids:
            await turn()
        await turn(100)  # nothing else is waited for
        assert not closing.done()
        while full:
            full -= len(os.read(r, full))
        await closing
        template.close()
        await template.wait()
        os.set_blocking(r, False)
        assert os.read(r, 100) == b"late\n"
        os.close(r)
        os.close(w)

    arun(main)


def test_close_gives_up_a_descriptor_that_takes_nothing(arun, jobs):
    async def main():
        r, w = os.pipe()
        full = fill(w)
        pool = afork.Pool(max=1, stdout=w, stderr=w)
        await pool.call(jobs.write, "late")
        await pool.close()
        # The loop still writes what is left, as long as it runs.
        while full:
            full -= len(os.read(r, full))
        os.set_blocking(r, False)
        left = b""
        while len(left) < 18:
            await turn()
            try:
                left += os.read(r, 100)
            except BlockingIOError:
                pass
        assert sorted(left.splitlines()) == [b"late err", b"late out"]
        os.close(r)
        os.close(w)

    arun(main)


def test_close_has_all_lines_though_a_program_is_left(arun, jobs, gate):
    """Whatever still has the pipe open is not waited for."""

    async def main():
        lines = []
        pool = afork.Pool(max=1, stdout=lines.append)
        await pool.call(jobs.leave_program, gate.path)
        await pool.call(jobs.write, "last\nunfinished")
        await pool.close()
        assert lines == ["first", "last", "unfinished out"]
        gate.open()

    arun(main)
