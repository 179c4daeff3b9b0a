"""What a review has found to go wrong around calls: each fault, once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket

import pytest

import afork

from .conftest import SCRIPTS
from .scripts.api_ask import PYTHONPATH
from .scripts.rpc_ask import Events, jobs, rpc
from .test_logs import Records

__all__ = ["jobs"]

#: Of a program that finds the package and rpc_jobs.
ENV = {**os.environ, "PYTHONPATH": f"{PYTHONPATH}:{SCRIPTS}"}


# -- arguments and results


def test_a_large_first_argument_with_things_of_the_main_program(run_script, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        """
import asyncio, afork

class Thing: pass

def work(thing, data):
    assert type(thing) is Thing
    return thing, len(data)

async def main():
    data = b"x" * (256 << 10)
    async with asyncio.timeout(10):
        async with afork.Pool(max=1) as pool:
            thing, n = await pool.call(work, Thing(), data)
            assert isinstance(thing, Thing) and n == len(data)
        async with afork.Pool(max=1) as pool:  # the function alone
            assert await pool.call(size, data) == n
        async with afork.Fork.new().rpc("rpc_jobs.echo") as f:
            thing, back = await f(Thing(), data)
            assert isinstance(thing, Thing) and back == data

def size(data):
    return len(data)

if __name__ == "__main__":
    asyncio.run(main())
    print("good")
"""
    )
    assert run_script(str(script), cwd=tmp_path, env=ENV).stdout == "good\n"


def test_no_descriptor_is_left_for_a_result(run_script):
    """Such a result is told apart from garbage."""
    done = run_script(
        """
import asyncio, errno, os, resource
import afork

async def main():
    async with asyncio.timeout(10):
        f = afork.Fork.new().rpc("rpc_jobs.double")
        await f(b"x")
        call = f(b"x" * 200_000)  # only the answer needs a descriptor
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        taken = []
        try:
            while True:
                taken.append(os.dup(0))
        except OSError as exc:
            assert exc.errno == errno.EMFILE
        try:
            await call
        except OSError as exc:
            print(type(exc).__name__, errno.errorcode[exc.errno])
        for fd in taken:
            os.close(fd)
        await f.close()

asyncio.run(main())
""",
        env=ENV,
    )
    assert done.stdout == "OSError EMFILE\n"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stream_that_is_cut_off_says_so(arun, asynchronous):
    """Somebody ends one direction of the socket; what comes can still be read."""

    async def main():
        name = "async_count_up" if asynchronous else "count_up"
        f = rpc(name, asynchronous=asynchronous)
        stream = f.stream(1000)
        assert await anext(stream) == 0
        fd = os.dup(f._connection.link.fileno())
        with socket.socket(fileno=fd) as sock:
            sock.shutdown(socket.SHUT_WR)
        with pytest.raises((ConnectionResetError, afork.WorkerLost)):
            async for _ in stream:
                pass
        with contextlib.suppress(afork.WorkerLost):
            await f.close()

    arun(main)


# -- events, logs and output


def test_an_event_of_a_thread_arrives_while_the_call_runs(arun):
    async def main():
        events = Events()
        async with rpc("event_of_a_thread", asynchronous=True, on_event=events) as f:
            call = f("wait")
            event = await events.get()
            assert (event.call_id, event.args) == (call.id, ("from a thread",))
            assert not call.done()
            await f("open")
            assert await call is True

    arun(main)


def test_levels_of_single_loggers_reach_a_process(arun):
    import rpc_jobs

    async def main():
        name = "test_rpc_faults.levels"
        logger, seen = logging.getLogger(name), Records()
        logger.setLevel(logging.DEBUG)
        logging.getLogger("test_rpc_faults").addHandler(seen)
        try:
            async with afork.Pool(max=1, logging=True) as pool:
                assert await pool.call(rpc_jobs.log, name) == (True, False)
                await seen.until(1)
        finally:
            logger.setLevel(logging.NOTSET)
            logging.getLogger("test_rpc_faults").removeHandler(seen)
        assert seen.messages == ["to be seen"]

    arun(main)


def test_what_c_code_has_printed_arrives_once(arun, capfd):
    import rpc_jobs

    async def main():
        lines = []
        template = afork.Fork.new().eval(
            "import ctypes; ctypes.CDLL(None).printf(b'of the template;')"
        )
        async with afork.Pool(template=template, max=2, stdout=lines.append) as pool:
            calls = [pool.call(rpc_jobs.printf, b"of a worker;") for _ in range(8)]
            await asyncio.gather(*calls)
        assert "".join(lines) == "of a worker;" * 8
        template.kill()
        await template.wait()

    arun(main)
    assert capfd.readouterr().out == "of the template;"


# -- forks


def test_a_fork_of_the_application_has_nothing_of_ours(run_script):
    """Sockets and pipes: a process would not notice that its peer has gone."""
    done = run_script(
        """
import asyncio, os
import afork

def kinds():
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            to = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if to.startswith(("socket:", "pipe:")):
            found[to] = fd
    return found

async def main():
    before = kinds()
    async with asyncio.timeout(10):
        async with (
            afork.Pool(max=1, logging=True, stdout=print, stderr=print) as pool,
            afork.Fork.new().rpc("os.getpid") as f,
        ):
            await pool.call(os.getpid)
            await f()
            assert kinds().keys() - before.keys()
            if (pid := os.fork()) == 0:
                left = kinds().keys() - before.keys()
                os._exit(1 if left else 0)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            await pool.call(os.getpid)
            await f()

asyncio.run(main())
"""
    )
    assert done.stdout == "0\n"


def test_no_warning_of_threads_that_are_not_there(arun):
    async def main():
        async with rpc("warnings_of_fork") as f:
            warnings, name = await f()
            assert warnings == []
            assert " " not in name

    arun(main)


def test_descriptors_that_the_kernel_does_not_take_are_tried_again_later(arun):
    """ETOOMANYREFS: the socket has room, so waiting for that would be busy."""
    code = """
    import asyncio, afork.rpc

    class Refusing:
        '''What a link does once its user has too many descriptors in flight.'''
        queued = 1
        tries = 0
        def __init__(self, link):
            self.link = link
        def flush(self, wait=False):
            self.tries += 1
            return False
        def __getattr__(self, name):
            return getattr(self.link, name)

    async def refused(turns):
        server = afork.rpc._server
        refusing = server.link = Refusing(server.link)
        server.flush_some()
        for _ in range(turns):
            await asyncio.sleep(0)
        server.link = refusing.link
        return refusing.tries
    """

    async def main():
        rpc = afork.Fork.new().eval(code).rpc("refused", asynchronous=True)
        assert 2 <= await rpc(500) < 250
        assert 2 <= await rpc(500) < 250
        await rpc.close()

    arun(main)
