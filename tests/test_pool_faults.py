"""Pool: processes and templates that fail, and how a pool ends."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import threading

import pytest

import afork
from afork.pool import _core
from afork.rpc._rpc import Setup

from .scripts.fault_tools import log, subreaper  # noqa: F401 - a fixture
from .scripts.pool_tools import Seen, check, gone, turn

# -- processes that do not start


@pytest.mark.parametrize("kind", [asyncio.CancelledError, GeneratorExit, ValueError])
def test_callbacks_that_raise(arun, jobs, tmp_path, log, kind):  # noqa: F811
    """Whatever it is: the pool goes on."""

    def fail(*_):
        raise kind("a callback")

    async def main():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: None)
        callbacks = {"on_error": fail, "on_destroy": fail, "on_event": fail}
        async with afork.Pool(max=1, **callbacks) as pool:
            assert await pool.call(jobs.progress, 2) == 2
            with pytest.raises(afork.WorkerLost):
                await pool.call(jobs.crash, "SIGKILL")
            assert await pool.call(jobs.add, 1) == 1
        async with afork.Pool(max=1, init=jobs.init_fail, **callbacks) as pool:
            with pytest.raises(LookupError):
                await pool.call(jobs.add, 1)
        assert not pool.stats().pids

    arun(main)
    log.lines.clear()


@pytest.mark.parametrize("load", [1, 3])
def test_init_that_raises(arun, jobs, tmp_path, log, load):  # noqa: F811
    path = tmp_path / "log"

    async def main():
        told = Seen()
        options = {"init": jobs.init_note_fail, "initargs": (str(path),)}
        async with afork.Pool(max=2, load=load, on_error=told, **options) as pool:
            calls = [pool.call(jobs.add, i) for i in range(5)]
            for call in calls:
                with pytest.raises(LookupError, match="no init today"):
                    await call
            tried = len(path.read_text().split())
            assert 1 <= tried <= 2
            # The second of two may be still ending.
            assert len(await told.first(tried)) == tried
            with pytest.raises(LookupError):
                await pool.call(jobs.add, 1)
            assert len(path.read_text().split()) == tried + 1
            async with asyncio.timeout(0.1):
                await pool.drain()
            check(pool)
        assert pool.stats().counts.failed == 6

    arun(main)
    log.lines.clear()


def test_init_that_raises_while_nobody_calls(arun, jobs, tmp_path, log):  # noqa: F811
    """No endless respawn."""
    path = tmp_path / "log"

    async def main():
        told = Seen()
        options = {"init": jobs.init_note_fail, "initargs": (str(path),)}
        async with afork.Pool(idle=2, max=2, on_error=told, **options):
            await told.first(2)
            await turn(100)
        assert len(path.read_text().split()) == 2

    arun(main)
    log.lines.clear()


def test_close_while_init_raises(arun, jobs, tmp_path, log):  # noqa: F811
    async def main():
        pool = afork.Pool(max=1, init=jobs.init_fail)
        calls = [pool.call(jobs.add, i) for i in range(3)]
        await turn()
        await pool.close()
        for call in calls:
            assert isinstance(call.exception(), LookupError)

    arun(main)


@pytest.mark.parametrize("turns", [0, 1, 3, 10, 30, 100])
def test_close_during_the_start(arun, jobs, turns):
    async def main():
        pool = afork.Pool(idle=2, max=3)
        calls = [pool.call(jobs.add, i) for i in range(4)]
        await turn(turns)
        await pool.close()
        assert [call.result() for call in calls] == [0, 1, 2, 3]
        pool = afork.Pool(idle=2, max=3)
        async with pool:
            await turn(turns)
        assert not pool.stats().pids

    arun(main)


def test_a_process_that_cannot_start_beside_ones_that_can(arun, jobs, log, tmp_path):  # noqa: F811
    """The others do what waits."""

    async def main():
        options = {"init": jobs.init_once, "initargs": (str(tmp_path / "once"),)}
        async with afork.Pool(max=3, **options) as pool:
            assert await pool.call(jobs.add, 1) == 1
            calls = [pool.call(jobs.add, i) for i in range(20)]
            assert await asyncio.gather(*calls) == list(range(20))
            check(pool)

    arun(main)
    log.lines.clear()


def test_no_descriptor_is_left(arun, jobs, log):  # noqa: F811
    async def main():
        async with afork.Pool(max=2, stdout=print, stderr=print) as pool:
            assert pool.template is not None
            await turn(3)
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)
            used = max(map(int, os.listdir("/proc/self/fd")))
            for extra in range(1, 8):
                resource.setrlimit(resource.RLIMIT_NOFILE, (used + extra, limit[1]))
                try:
                    await pool.call(jobs.add, 1)
                except OSError:
                    pass
                else:
                    break
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, limit)
                check(pool)
            assert await pool.call(jobs.add, 1) == 1
            check(pool)

    arun(main)
    log.lines.clear()


def test_start_that_fails_is_tried_again(arun, jobs, log, monkeypatch):  # noqa: F811
    """No descriptor is left for the pipe of the second of three."""
    made = []
    real = _core.OutputPipe

    def pipe(*args):
        made.append(None)
        if len(made) == 2:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(*args)

    monkeypatch.setattr(_core, "OutputPipe", pipe)
    monkeypatch.setattr(_core, "_PAUSE", 0.01)

    async def main():
        told = Seen()
        async with afork.Pool(idle=3, max=3, on_error=told) as pool:
            while pool.stats().idle < 3:
                await turn()
            assert pool.stats().counts.started == 3
            assert [error.errno for error in told.all] == [errno.EMFILE]

    arun(main)
    log.lines.clear()


def test_more_processes_than_descriptors(arun, jobs, gate, log, monkeypatch):  # noqa: F811
    """It makes do with those that there is room for, and leaves some to us."""
    monkeypatch.setattr(_core, "_PAUSE", 0.01)

    async def main():
        told, seen = Seen(), Seen()
        async with afork.Pool(max=20, on_error=told, on_event=seen) as pool:
            assert pool.template is not None
            await turn(3)
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)
            used = len(os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, limit[1]))
            try:
                calls = [pool.call(jobs.hold, gate.path) for _ in range(25)]
                while not told.all:
                    await turn()
                assert {error.errno for error in told.all} == {errno.EMFILE}
                for fd in [os.dup(0) for _ in range(8)]:
                    os.close(fd)
                few = pool.stats().counts.started
                assert 1 < few < 20
                await seen.held(few)
                gate.open(1)
                await seen.held(few + 1)  # what waits gets the processes there are
                assert pool.stats().counts.started < 20
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            await seen.held(21)  # and more of them once there can be
            gate.open(24)
            assert await asyncio.gather(*calls) == [None] * 25
            assert pool.stats().counts.lost == 0
            check(pool)

    arun(main)
    log.lines.clear()


def test_start_is_refused_until_another_ends(arun, jobs, log, monkeypatch):  # noqa: F811
    real = _core.OutputPipe

    async def main():
        async with afork.Pool(max=1, max_calls=1) as pool:

            def pipe(*args):
                if pool.stats().leaving:
                    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
                return real(*args)

            monkeypatch.setattr(_core, "OutputPipe", pipe)
            pids = [pool.call(jobs.pid) for _ in range(4)]
            assert len(set(await asyncio.gather(*pids))) == 4
            check(pool)

    arun(main)
    assert log.lines
    log.lines.clear()


def test_own_template_that_cannot_be_replaced(arun, jobs, log, monkeypatch):  # noqa: F811
    async def main():
        async with afork.Pool(max=1) as pool:
            assert await pool.call(jobs.add, 1) == 1
            template = pool._core.template.get()
            template.kill()
            await template.wait()
            pool.call(jobs.pid).cancel()
            with monkeypatch.context() as patch:
                tried = []

                def new():
                    tried.append(None)
                    raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

                patch.setattr(afork.Fork, "new", new)
                with pytest.raises(OSError, match="No such file"):
                    await pool.call(jobs.add, 1)
                assert len(tried) == 1
            assert await pool.call(jobs.add, 1) == 1

    arun(main)
    log.lines.clear()


def test_template_that_dies_during_a_start(arun, jobs, log, monkeypatch):  # noqa: F811
    """What cannot start because of that is not the end of what waits."""
    run = Setup.run

    async def main():
        async with afork.Pool(max=1) as pool:
            pid = await pool.call(jobs.pid)
            failed = []

            def fail_once(*args):
                if not failed:
                    failed.append(pool._core.template.get().kill())
                    pool._core.template.get()._process.gone = True  # as is known soon
                    raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))
                return run(*args)

            monkeypatch.setattr(Setup, "run", fail_once)
            os.kill(pid, signal.SIGKILL)
            await gone([pid])
            while await pool.call(jobs.pid) == pid:
                pass
            assert failed

    arun(main)
    log.lines.clear()


def test_many_calls_that_cannot_be_sent(arun, jobs, gate):
    """No descriptor for their arguments: each fails, none takes the others along."""

    async def main():
        seen = Seen()
        async with afork.Pool(max=1, on_event=seen) as pool:
            first = pool.call(jobs.hold, gate.path)
            await seen.held(1)
            large = bytearray(300_000)
            calls = [pool.call(jobs.echo, large) for _ in range(300)]
            small = pool.call(jobs.add, 1)
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
            try:
                gate.open()
                await first
                assert await small == 1
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            for call in calls:
                assert isinstance(call.exception(), OSError)
            check(pool)
            assert await pool.call(jobs.add, 1) == 1

    arun(main)


# -- templates


def test_own_template_is_replaced(arun, jobs, gate):
    async def main():
        seen = Seen()
        async with afork.Pool(max=2, on_event=seen) as pool:
            for _ in range(3):
                calls = [pool.call(jobs.hold, gate.path) for _ in range(4)]
                await seen.held(2)
                template = pool._core.template.get()
                pids = pool.stats().pids
                template.kill()
                await gone(list(pids))
                results = [
                    asyncio.gather(call, return_exceptions=True) for call in calls
                ]
                gate.open(4)
                for (result,) in await asyncio.gather(*results):
                    assert result is None or isinstance(
                        result, afork.WorkerLost | afork.TemplateError
                    )
                assert await pool.call(jobs.add, 1) == 1
                assert pool._core.template.get() is not template
                check(pool)
                while os.read(gate.fd, 100) == b"":
                    pass
                seen.all.clear()

    arun(main)


def test_own_template_that_was_prepared(arun, jobs, gate, log):  # noqa: F811
    """Another one would lack what has been done to it."""

    async def main():
        async with afork.Pool(max=1, init=jobs.init) as pool:
            template = pool.template.send_arg("prepared")
            assert await pool.call(jobs.get_state) == ["prepared"]
            template.kill()
            await template.wait()
            pool.call(jobs.add, 1).cancel()  # its process goes as well
            for _ in range(2):
                with pytest.raises(afork.TemplateError):
                    await pool.call(jobs.get_state)
            assert pool.template is template
            check(pool)

    arun(main)
    log.lines.clear()


def test_given_template_that_dies(arun, jobs, gate, log):  # noqa: F811
    async def main():
        seen = Seen()
        template = afork.Fork.new()
        async with afork.Pool(template=template, max=2, on_event=seen) as pool:
            calls = [pool.call(jobs.hold, gate.path) for _ in range(4)]
            await seen.held(2)
            template.kill()
            for call in calls:
                with pytest.raises((afork.WorkerLost, afork.TemplateError)):
                    await call
            with pytest.raises(afork.TemplateError):
                await pool.call(jobs.add, 1)
            check(pool)

    arun(main)
    log.lines.clear()


def test_template_that_fails(arun, jobs, log):  # noqa: F811
    async def main():
        template = afork.Fork.new().eval("1 / 0")
        async with afork.Pool(template=template, max=2) as pool:
            for _ in range(2):
                with pytest.raises(afork.RemoteError, match="ZeroDivisionError"):
                    await pool.call(jobs.add, 1)
        template = afork.Fork.new()
        template.close()
        pool = afork.Pool(template=template)
        with pytest.raises(afork.ClosedError):
            pool.call(jobs.add, 1)
        await pool.close()

    arun(main)
    log.lines.clear()


def test_several_pools_on_one_template(arun, jobs):
    async def main():
        template = afork.Fork.new().require("pool_jobs")
        async with (
            afork.Pool(template=template, max=1) as one,
            afork.Pool(template=template, max=1, asynchronous=True) as two,
        ):
            assert await one.call(jobs.add, 1) == 1
            assert await two.call(jobs.add_async, 2) == 2
        async with afork.Pool(template=template, max=1) as three:
            assert await three.call(jobs.add, 3) == 3

    arun(main)


def test_one_template_for_several_loops(arun, jobs):
    template = afork.Fork.new().require("pool_jobs")

    async def main():
        async with afork.Pool(template=template, max=1) as pool:
            return await pool.call(jobs.add, 1)

    assert [arun(main) for _ in range(3)] == [1, 1, 1]


# -- loops


def test_wrong_loop(arun, jobs):
    async def main():
        async with afork.Pool(max=1) as pool:
            assert await pool.call(jobs.add, 1) == 1
            errors = []

            async def elsewhere():
                for use in (
                    lambda: pool.call(jobs.add, 1),
                    lambda: pool.stream(jobs.count, 1),
                    lambda: pool.template,
                ):
                    with pytest.raises(RuntimeError, match="another event loop"):
                        use()
                for use in (pool.drain, pool.close):
                    with pytest.raises(RuntimeError, match="another event loop"):
                        await use()
                errors.append(None)

            thread = threading.Thread(target=lambda: asyncio.run(elsewhere()))
            thread.start()
            await asyncio.to_thread(thread.join)
            assert errors == [None]
            assert await pool.call(jobs.add, 1) == 1
        with pytest.raises(RuntimeError, match="no running"):
            await asyncio.to_thread(afork.Pool().call, jobs.add, 1)

    arun(main)


# -- close


def test_processes_that_do_not_end(arun, jobs, gate):
    """Whatever they do: they are killed."""

    async def main():
        seen = Seen()
        async with afork.Pool(max=3, on_event=seen) as pool:
            calls = [pool.call(jobs.stay, how) for how in ("term", "thread", "exit")]
            pids = await asyncio.gather(*calls)
        await gone(pids)
        assert not pool.stats().pids

    arun(main)


def test_stopped_processes(arun, jobs):
    async def main():
        async with afork.Pool(max=1) as pool:
            pid = await pool.call(jobs.pid)
            os.kill(pid, signal.SIGSTOP)
            call = pool.call(jobs.add, 1)
            await turn(5)
            call.cancel()
            assert await pool.call(jobs.add, 2) == 2
            pid = await pool.call(jobs.pid)
            os.kill(pid, signal.SIGSTOP)
        await gone([pid])

    arun(main)


def test_close_twice_and_together(arun, jobs, gate):
    async def main():
        seen, over = Seen(), Seen()
        pool = afork.Pool(max=1, on_event=seen, on_destroy=over)
        call = pool.call(jobs.hold, gate.path)
        await seen.held(1)
        first = asyncio.create_task(pool.close())
        second = asyncio.create_task(pool.close())
        await turn()
        assert not first.done()
        await pool.close(timeout=0)
        await asyncio.gather(first, second)
        assert call.cancelled()
        assert len(over.all) == 1

    arun(main)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_close_while_the_template_is_busy(arun, jobs, gate, own, n):
    """The template does not say that it is, and may be so for ever."""

    async def main():
        given = None if own else afork.Fork.new()
        pool = afork.Pool(max=n, template=given)
        template = pool.template.eval("open(args[0]).read(1)", gate.path)
        calls = [pool.call(jobs.add, i) for i in range(4)]
        await turn(3)
        forks = [worker.fork for worker in pool._core.workers]
        assert len(forks) == n
        await pool.close(timeout=0)
        assert all(call.cancelled() for call in calls)
        assert not pool.stats().pids
        if own:
            assert template.returncode == -signal.SIGKILL
        else:
            gate.open()
            for fork in forks:  # they end as soon as they have begun
                await fork.wait()
            async with afork.Pool(template=template) as other:
                assert await other.call(jobs.add, 1) == 1

    arun(main)
