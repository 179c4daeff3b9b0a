"""Spares: processes in advance, what replaces them, and what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import select
import signal
from pathlib import Path

import pytest

import afork

from .conftest import read_all
from .scripts.fault_tools import ECHO

ASK = """
def ask(sock, expression):
    sock.sendall(repr(eval(expression)).encode())
"""


async def ask(f, expression):
    """The value of an expression in a process, which ends with it."""
    return (await read_all(await f.send_arg(expression).run("ask"))).decode()


def children_of(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def title(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode()
    return ""


async def ready_spares(template, n: int, but: set[int] = frozenset()) -> set[int]:
    """The pids of n spares, once they are there."""
    async with asyncio.timeout(10):
        while True:
            pids = children_of(template.pid) - but
            found = {p for p in pids if title(p) == "afork: spare"}
            if len(found) == n:
                return found
            # There is nobody to tell us: that is the point of them.
            await asyncio.sleep(0.001)


async def template_with(n: int):
    f = await afork.Fork.new_exec().eval(ASK).spares(n).ready(spares=True)
    return f, await ready_spares(f, n)


def test_waited_for(arun):
    async def main():
        f = await afork.Fork.new_exec().spares(3).ready(spares=True)
        assert (await f.stats())["spares"]["ready"] == 3
        for change in (lambda: f.eval("pass"), lambda: f.spares(5)):
            waits = asyncio.gather(*(change().ready(spares=n != 1) for n in range(3)))
            await waits
            told = (await f.stats())["spares"]
            assert told["ready"] == told["most"]
        await f.spares(0).ready(spares=True)
        waiting = asyncio.ensure_future(f.eval("1 / 0").spares(2).ready(spares=True))
        with pytest.raises(afork.RemoteError, match="division by zero"):
            await waiting
        f.close()
        assert await f.wait() == 0

    arun(main)


def test_run(arun):
    async def main():
        f, spares = await template_with(2)
        for _ in range(5):
            child = f.fork()
            assert await ask(child, "1 + 1") == "2"
            assert child.pid in spares
            assert await child.wait() == 0
            spares = await ready_spares(f, 2)
        f.close()
        assert await f.wait() == 0

    arun(main)


def test_exec_and_many(arun):
    async def main():
        f, spares = await template_with(3)
        children = f.fork_many(5)
        await asyncio.gather(*(c.exec("true") for c in children))
        assert spares <= {c.pid for c in children}
        assert [await c.wait() for c in children] == [0] * 5
        f.close()
        assert await f.wait() == 0

    arun(main)


def test_a_child_of_a_spare_is_like_any_other(arun):
    """Titles, signals, parent, exit status, further forks."""

    async def main():
        f, spares = await template_with(2)
        child = f.fork().eval("import os, signal")
        assert await child.ready() is child
        assert child.pid in spares
        assert title(child.pid) == "afork: template"
        inner = child.fork()
        facts = "os.getppid(), signal.getsignal(signal.SIGTERM), sorted(os.listdir('/proc/self/fd'))"
        told = await ask(inner, facts)
        plain = afork.Fork.new_exec().eval(ASK).eval("import os, signal")
        reference = await ask(plain.fork(), facts)
        assert told.split(", ", 1)[1] == reference.split(", ", 1)[1]
        assert int(told[1:].split(",")[0]) == child.pid
        child.close()
        assert await child.wait() == 0
        for each in (f, plain):
            each.close()
            assert await each.wait() == 0

    arun(main)


@pytest.mark.parametrize(
    ("change", "expression", "expected"),
    [
        (lambda f: f.eval("x = 1"), "x", "1"),
        (lambda f: f.require("json"), "json.dumps([])", "'[]'"),
        (
            lambda f: f.set(env={"SPARE": "1"}),
            "__import__('os').environ['SPARE']",
            "'1'",
        ),
        (lambda f: f.set(umask=0o70), "__import__('os').umask(0)", "56"),
    ],
)
def test_the_template_changes(arun, change, expression, expected):
    async def main():
        f, spares = await template_with(2)
        child = change(f).fork()
        assert await ask(child, expression) == expected
        assert child.pid not in spares
        await ready_spares(f, 2, spares)
        assert await ask(f.fork(), expression) == expected
        f.close()
        assert await f.wait() == 0

    arun(main)


def test_arguments_and_handles_are_theirs_too(arun):
    async def main():
        f = afork.Fork.new_exec().eval(ECHO).spares(1)
        await f.ready()
        spares = await ready_spares(f, 1)
        f.send_arg("late").send_fh(0)
        told = await read_all(await f.fork().run("echo"))
        assert told.startswith(b"('late', ")
        await ready_spares(f, 1, spares)
        again = await read_all(await f.fork().run("echo"))
        assert again.startswith(b"('late', ")
        f.close()
        assert await f.wait() == 0

    arun(main)


def test_killed_while_idle(arun):
    async def main():
        f, spares = await template_with(2)
        for pid in spares:
            os.kill(pid, signal.SIGKILL)
        assert await ask(f.fork(), "7") == "7"
        spares = await ready_spares(f, 2, spares)
        child = f.fork()
        assert await ask(child, "7") == "7"
        assert child.pid in spares
        f.close()
        assert await f.wait() == 0

    arun(main)


def test_killed_while_being_handed_over(arun):
    async def main():
        f, spares = await template_with(2)
        for pid in spares:
            os.kill(pid, signal.SIGSTOP)
        run = asyncio.ensure_future(ask(f.fork(), "7"))
        await f.ready()  # it has been handed over
        for pid in spares:
            os.kill(pid, signal.SIGKILL)
        assert await run == "7"
        f.close()
        assert await f.wait() == 0

    arun(main)


def test_killed_at_any_moment(arun):
    """One after the other, somewhere on its way: no request is lost."""

    async def main():
        f, _ = await template_with(3)
        lost = 0
        for _ in range(40):
            spare = next(iter(await ready_spares(f, 3)))
            run = asyncio.ensure_future(ask(f.fork(), "7"))
            await asyncio.sleep(0)
            with contextlib.suppress(ProcessLookupError):
                os.kill(spare, signal.SIGKILL)
            try:
                assert await run in ("7", "")  # "": killed in the function
            except afork.WorkerLost as exc:
                assert exc.status == 9  # noqa: PT017 - killed once it had started
                lost += 1
        assert lost < 40
        f.close()
        assert await f.wait() == 0

    arun(main)


def test_killed_behind_a_pool(arun):
    """Each call needs another process: all are answered, or their own was killed."""

    async def main():
        f, _ = await template_with(3)
        lost = 0
        async with afork.Pool(template=f, max=2, max_calls=1) as pool:
            for n in range(40):
                spare = next(iter(await ready_spares(f, 3)))
                calls = [pool.call(abs, -n) for _ in range(2)]
                await asyncio.sleep(0)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(spare, signal.SIGKILL)
                for found in await asyncio.gather(*calls, return_exceptions=True):
                    if isinstance(found, afork.WorkerLost):
                        lost += 1
                    else:
                        assert found == n
            assert pool.stats().counts.started >= 80 - lost
        assert lost < 40
        f.close()
        assert await f.wait() == 0

    arun(main)


def test_given_up_before_a_request_is_refused(arun):
    async def main():
        f, _ = await template_with(4)
        taken = set(map(int, os.listdir(f"/proc/{f.pid}/fd")))
        limit = resource.prlimit(f.pid, resource.RLIMIT_NOFILE)
        low = max(taken) + 1
        resource.prlimit(f.pid, resource.RLIMIT_NOFILE, (low, limit[1]))
        handles = low - len(taken) + 3
        f.send_fh(*[0] * handles)
        await f.ready()
        resource.prlimit(f.pid, resource.RLIMIT_NOFILE, limit)
        assert len(await ask_count(f)) == handles
        f.close()
        assert await f.wait() == 0

    async def ask_count(f):
        f.eval("def count(sock, *handles): sock.send(b'.' * len(handles))")
        return await read_all(await f.fork().run("count"))

    arun(main)


def test_run_on_the_template_itself(arun):
    """It is the parent of its spares: a copy of it is run."""

    async def main():
        f, spares = await template_with(2)
        pid = f.pid
        assert await ask(f, "7") == "7"
        assert f.pid != pid
        assert f.pid not in spares  # they lack the argument
        assert await f.wait() == 0

    arun(main)


def test_no_descriptor_left_in_the_application(run_script):
    """The start is refused, and no spare is lost by it."""
    run_script(
        """
import asyncio, errno, os, resource
import afork

async def main():
    template = await afork.Fork.new_exec().spares(2).ready()
    while (told := await template.stats())["spares"]["ready"] < 2:
        pass
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (os.dup(0) + 1, hard))
    filler = []
    try:
        while True:
            filler.append(os.dup(0))
    except OSError:
        pass
    for start in (template.fork, lambda: template.fork_many(2)[0]):
        try:
            await start().ready()
        except OSError as exc:
            assert exc.errno == errno.EMFILE, exc
        else:
            raise AssertionError(start)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for fd in filler:
        os.close(fd)
    child = await template.fork().ready()
    told = (await template.stats())["spares"]
    assert told["died"] == 0, told
    assert told["hits"] >= 1, told
    child.close()
    assert await child.wait() == 0
    template.close()
    assert await template.wait() == 0

asyncio.run(asyncio.wait_for(main(), 10))
"""
    )


def test_values(arun):
    async def main():
        f = afork.Fork.new()
        for n in (-1, 65):
            with pytest.raises(ValueError, match="spares must be 0 to 64"):
                f.spares(n)
        for wrong in (2.5, None, "x"):
            with pytest.raises(TypeError, match="integer"):
                f.spares(wrong)
        assert f.spares(0) is f
        f.close()
        with pytest.raises(afork.ClosedError):
            f.spares(1)

    arun(main)


def test_of_the_default_template(arun):
    """Fork.new() and create_subprocess_exec, whose arguments pass through."""

    async def main():
        default = afork.Fork.default().eval(ASK).spares(2)
        await default.ready()
        spares = await ready_spares(default, 2)
        program = await afork.create_subprocess_exec("cat", stdin=-1)
        program.stdin.close()
        assert await program.wait() == 0
        child = afork.Fork.new()
        assert await ask(child, "7") == "7"
        assert child.pid in spares

    arun(main)


def test_they_die_with_the_application(run_script):
    out = run_script(
        """
import asyncio, os, afork

async def main():
    f = afork.Fork.new_exec().spares(2)
    await f.ready()
    path = f"/proc/{f.pid}/task/{f.pid}/children"
    while len(pids := open(path).read().split()) < 2:
        await asyncio.sleep(0.001)
    print(*pids, flush=True)
    os._exit(0)

asyncio.run(main())
"""
    ).stdout
    for pid in out.split():
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(int(pid))
            try:
                assert select.select([fd], [], [], 10)[0]
            finally:
                os.close(fd)
