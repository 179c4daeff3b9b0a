"""Limits reached: descriptors here and in the template, processes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource

import pytest

import afork

from .conftest import children, open_descriptors, read_all
from .scripts.fault_tools import ECHO, children_of, descriptors_of, log  # noqa: F401

NOFILE = resource.RLIMIT_NOFILE


@contextlib.contextmanager
def free_slots(n):
    """This process has room for n more descriptors and not one more."""
    soft, hard = resource.getrlimit(NOFILE)
    fillers = []
    resource.setrlimit(NOFILE, (max(open_descriptors()) + 1 + n, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                fillers.append(os.dup(0))
        for _ in range(n):
            os.close(fillers.pop())
        yield
    finally:
        for fd in fillers:
            os.close(fd)
        resource.setrlimit(NOFILE, (soft, hard))


@contextlib.contextmanager
def limited(pid, which, n):
    """Another process has a limit."""
    soft, hard = resource.prlimit(pid, which)
    resource.prlimit(pid, which, (n, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, which, (soft, hard))


async def echo():
    return await read_all(await afork.Fork.new().eval(ECHO).run("echo"))


async def program():
    p = await afork.create_subprocess_exec("sh", "-c", "exit 7", stdout=-1, stdin=-1)
    await p.communicate()
    return p.returncode


async def send():
    r, w = os.pipe()
    try:
        f = afork.Fork.new().send_fh(r, w, r)
    finally:
        os.close(r)
        os.close(w)
    return await read_all(await f.eval(ECHO).run("echo"))


async def many():
    made = afork.Fork.new().fork_many(3)
    for f in made:
        await read_all(await f.eval(ECHO).run("echo"))


async def become():
    f = afork.Fork.new()
    sock = await f.exec("cat", stdin=afork.SOCKET, stdout=afork.SOCKET)
    sock.close()
    assert await f.wait() == 0


async def interpreter():
    f = afork.Fork.new_exec()
    await f.ready()
    f.close()
    assert await f.wait() == 0


WAYS = {f.__name__: f for f in (echo, program, send, many, become, interpreter)}


@pytest.mark.parametrize("way", WAYS)
def test_no_descriptors_left_in_the_application(arun, way):
    async def main():
        for each in WAYS.values():
            await each()  # what is imported late has been now
        template = afork.Fork.default()
        pid = template.pid
        fds = len(open_descriptors())
        failed = 0
        for n in range(40):
            with free_slots(n):
                try:
                    await WAYS[way]()
                except OSError as exc:
                    assert exc.errno == errno.EMFILE, n  # noqa: PT017
                    failed += 1
                else:
                    break
        assert 0 < failed < 30
        await WAYS[way]()
        assert afork.Fork.default().pid == pid
        del template
        await settled(fds)
        # What went wrong here has left nothing in the template.
        assert await echo() == b"()"
        assert len(descriptors_of(pid)) <= 6

    arun(main)


async def settled(fds):
    """Sockets and pidfds close as their processes end."""
    while len(open_descriptors()) > fds:
        await asyncio.sleep(0)


def test_no_descriptors_left_to_make_the_first_template(arun):
    async def main():
        for each in WAYS.values():
            await each()
        for n in range(40):
            await lose_default()
            kids = children()
            with free_slots(n):
                try:
                    await echo()
                except OSError as exc:
                    assert exc.errno == errno.EMFILE  # noqa: PT017
                else:
                    break
            assert children() == kids
        assert 0 < n < 30
        assert await echo() == b"()"

    async def lose_default():
        f = afork.Fork.default()
        f.kill()
        await f.wait()

    arun(main)


def test_a_pidfd_that_does_not_fit_is_made_later_or_not_needed(arun):
    async def main():
        await echo()
        f = afork.Fork.new().eval("import time\ndef f(sock): sock.recv(1)")
        with free_slots(0):
            sock = await f.run("f")
            assert f.pid is not None
        sock.close()
        assert await f.wait() == 0
        f = afork.Fork.new().eval("import time\ndef f(sock): time.sleep(1000)")
        with free_slots(0):
            sock = await f.run("f")
        sock.close()
        f.kill()
        assert await f.wait() == -9

    arun(main)


def test_a_signal_waits_for_a_descriptor(arun):
    """Whatever kills a process in a callback could do nothing with an error."""

    async def main():
        await echo()
        f = afork.Fork.new().eval("import time\ndef f(sock): time.sleep(1000)")
        with free_slots(0):
            sock = await f.run("f")
            f.kill()
            assert f.returncode is None
        sock.close()
        assert await f.wait() == -9

    arun(main)


# -- in the template


def test_descriptors_lost_in_the_template(arun):
    async def main():
        await program()
        template = afork.Fork.default()
        await template.ready()
        before = descriptors_of(template.pid)
        n = max(before) + 1
        assert len(before) == n, "there are gaps"
        for free in range(8):
            with limited(template.pid, NOFILE, n + free):
                try:
                    await echo()
                except OSError as exc:
                    assert exc.errno == errno.EMFILE  # noqa: PT017
                    assert free == 0
                try:
                    assert await program() == 7
                except OSError as exc:
                    assert exc.errno in (errno.EMFILE, errno.EINVAL)  # noqa: PT017
                    assert free < 8
            assert await echo() == b"()"
            assert await program() == 7
            assert afork.Fork.default().pid == template.pid
        await template.ready()
        assert descriptors_of(template.pid) == before
        assert template._process.children == {}

    arun(main)


@pytest.mark.parametrize(("one_by_one", "free"), [(1, 0), (1, 1), (0, 1), (0, 2)])
def test_many_requests_of_which_some_are_lost(arun, one_by_one, free):
    """fork takes one descriptor of the template at a time, fork_many two."""

    async def main():
        template = afork.Fork.new_exec().eval("def quit(sock): pass")
        await template.ready()
        n = max(descriptors_of(template.pid)) + 1
        with limited(template.pid, NOFILE, n + free):
            if one_by_one:
                forks = [template.fork() for _ in range(6)]
            else:
                forks = template.fork_many(6)
            runs = [f.run("quit") for f in forks]
            results = await asyncio.gather(*runs, return_exceptions=True)
        lost = [r for r in results if isinstance(r, OSError)]
        enough = free >= (1 if one_by_one else 2)
        assert [e.errno for e in lost] == [errno.EMFILE] * (0 if enough else 6)
        for sock in results:
            if not isinstance(sock, OSError):
                await read_all(sock)
        for f in template.fork_many(6):
            assert await read_all(await f.run("quit")) == b""
        template.close()
        assert await template.wait() == 0

    arun(main)


def test_a_pending_descriptor_that_was_lost(arun):
    async def main():
        template = afork.Fork.new_exec()
        await template.ready()
        n = max(descriptors_of(template.pid)) + 1
        with limited(template.pid, NOFILE, n):
            template.send_fh(0)
            await template.ready()
        # Whoever would get it is told; the others need not suffer.
        child = template.fork()
        with pytest.raises(OSError, match="lost") as info:
            await child.run("os.getpid")
        assert info.value.errno == errno.EMFILE
        child = template.fork()
        assert await child.exec("true") is None
        assert await child.wait() == 0
        template.close()
        assert await template.wait() == 0

    arun(main)


def test_code_without_descriptors_still_tells_what_is_wrong(arun):
    async def main():
        f = afork.Fork.new_exec()
        await f.ready()
        n = max(descriptors_of(f.pid)) + 1
        with limited(f.pid, NOFILE, n):
            f.eval("raise ValueError('what it was')")
            with pytest.raises(afork.RemoteError) as info:
                await f.ready()
        assert info.value.type == "ValueError"
        assert info.value.message == "what it was"
        f.close()
        assert await f.wait() == 0

    arun(main)


# -- processes

NPROC = """
hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
soft = hard if args[0] == "-1" else int(args[0])
resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
"""


@pytest.mark.unprivileged
def test_no_processes_left(arun):
    """The limit counts for users other than root, so a template becomes one."""

    async def main():
        template = (
            afork.Fork.new_exec()
            .eval(
                """
            import os, resource
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            """
            )
            .eval(NPROC, "0")
        )
        await template.ready()
        for f in (template.fork(), *template.fork_many(3)):
            with pytest.raises(BlockingIOError) as info:
                await f.run("os.getpid")
            assert info.value.errno == errno.EAGAIN
            assert "fork failed" in info.value.__notes__[0]
            with pytest.raises(BlockingIOError):
                await f.wait()
            await f._process.until(lambda p=f._process: p.gone)
        template.eval(NPROC, "-1")
        assert children_of(template.pid) == []
        assert template._process.children == {}
        f = template.fork().eval(ECHO)
        assert await read_all(await f.run("echo")) == b"()"
        assert await f.wait() == 0
        template.close()
        assert await template.wait() == 0

    arun(main)


@pytest.mark.unprivileged
def test_no_processes_left_for_programs(arun):
    async def main():
        template = (
            afork.Fork.default()
            .eval(
                """
            import os, resource
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            """
            )
            .eval(NPROC, "0")
        )
        await template.ready()
        for _ in range(2):
            with pytest.raises(BlockingIOError):
                await afork.create_subprocess_exec("true", cwd="/")
        template.eval(NPROC, "-1")
        p = await afork.create_subprocess_exec("true", cwd="/")
        assert await p.wait() == 0
        assert afork.Fork.default().pid == template.pid

    arun(main)
