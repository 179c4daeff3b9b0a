"""The kernel refuses a fork, for lack of processes or of memory, in each mode."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal

import pytest

import afork

from .conftest import need, read_all
from .scripts.fault_tools import ECHO
from .test_spares import ASK, ask, ready_spares

NOBODY = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
import resource
def quit(sock): pass
def limit(sock):
    before = resource.getrlimit(resource.RLIMIT_NPROC)
    while n := sock.recv(10):
        which = before if int(n) < 0 else (int(n), before[1])
        resource.prlimit(os.getppid(), resource.RLIMIT_NPROC, which)
        sock.send(b".")
def become_nobody():
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
"""

NEWPID = 0x20000000


@pytest.fixture
def loop_factory():
    """Who refuses is the kernel: it is the same for every kind of loop."""
    return asyncio.new_event_loop


class NoProcesses:
    """EAGAIN: the user has as many as may be. Root has no such limit.

    The limit is set from outside by a worker of the same user: code that ran in
    the template would change it, and cost it its spares.
    """

    number = errno.EAGAIN

    def __init__(self, template):
        # Nobody may not be able to load what is in root's folders.
        template.require("afork.rpc._sync", "afork.rpc._redirect")
        self.template = template.eval(NOBODY).eval("become_nobody()")

    async def start(self):
        self.sock = await self.template.fork().run("limit")

    async def _set(self, n):
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.sock, b"%d" % n)
        assert await loop.sock_recv(self.sock, 1) == b"."

    async def refuse(self):
        await self._set(0)

    async def allow(self):
        await self._set(-1)
        self.sock.close()


class NoMemory:
    """ENOMEM: a pid namespace has lost its first process."""

    number = errno.ENOMEM

    def __init__(self, template):
        need("root", os.geteuid() == 0, "only root can make a pid namespace")
        self.template = template.eval(NOBODY)

    async def start(self):
        pass

    async def refuse(self):
        self.template.eval(
            f"""
            home = os.open("/proc/self/ns/pid", os.O_RDONLY)
            assert libc.unshare({NEWPID}) == 0
            """
        )
        # It sees no parent there and ends at once.
        with pytest.raises(afork.WorkerLost):
            await self.template.fork().run("quit")

    async def allow(self):
        self.template.eval(f"assert libc.setns(home, {NEWPID}) == 0; os.close(home)")
        await self.template.ready()


REFUSALS = [
    pytest.param(NoProcesses, id="EAGAIN", marks=pytest.mark.unprivileged),
    pytest.param(NoMemory, id="ENOMEM"),
]


async def fork(template):
    return [template.fork().run("quit")]


async def fork_many(template):
    return [f.run("quit") for f in template.fork_many(3)]


async def program(template):
    return [template.fork().exec("true")]


async def rpc(template):
    caller = template.fork().rpc("os.getppid")
    return [caller(), caller()]


async def ready(template):
    return [template.fork().ready()]


MODES = {f.__name__: f for f in (fork, fork_many, program, rpc, ready)}


@pytest.mark.parametrize("freeze", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", REFUSALS)
def test_whoever_asked_is_told(arun, kind, mode, freeze):
    async def main():
        template = afork.Fork.new_exec()
        refusal = kind(template)
        template.eval(ECHO)
        if freeze:
            template.freeze()
        await refusal.start()
        await refusal.refuse()
        for _ in range(2):
            asked = await MODES[mode](template)
            results = await asyncio.gather(*asked, return_exceptions=True)
            assert [getattr(e, "errno", e) for e in results] == [kind.number] * len(
                results
            )
        await refusal.allow()
        f = template.fork()
        assert await read_all(await f.run("echo")) == b"()"
        assert await f.wait() == 0
        template.close()
        assert await template.wait() == 0

    arun(main)


@pytest.mark.parametrize("kind", REFUSALS)
def test_calls_of_a_pool(arun, kind):
    """They fail with it, and the pool goes on once there is room."""

    async def main():
        template = afork.Fork.new_exec()
        refusal = kind(template)
        await refusal.start()
        await refusal.refuse()
        async with afork.Pool(template=template, max=2) as pool:
            calls = [pool.call(os.getpid) for _ in range(4)]
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert [getattr(e, "errno", e) for e in results] == [kind.number] * 4
            await refusal.allow()
            assert await pool.call(abs, -7) == 7
        template.close()

    arun(main)


@pytest.mark.parametrize("kind", REFUSALS)
def test_programs_of_the_default_template(arun, kind):
    async def main():
        default = afork.Fork.default()
        refusal = kind(default)
        await refusal.start()
        await refusal.refuse()
        for _ in range(2):
            with pytest.raises(OSError) as info:  # noqa: PT011
                await afork.create_subprocess_exec("true", cwd="/")
            assert info.value.errno == kind.number
        await refusal.allow()
        done = await afork.create_subprocess_exec("true", cwd="/")
        assert await done.wait() == 0
        assert afork.Fork.default().pid == default.pid

    arun(main)


@pytest.mark.parametrize("kind", REFUSALS)
def test_spares_come_once_there_is_room(arun, kind):
    async def main():
        template = afork.Fork.new_exec()
        refusal = kind(template)
        await refusal.start()
        await refusal.refuse()
        template.eval(ASK).spares(2)
        for _ in range(2):
            with pytest.raises(OSError) as info:  # noqa: PT011
                await template.fork().run("quit")
            assert info.value.errno == kind.number
        assert (await template.stats())["spares"]["ready"] == 0
        await refusal.allow()
        spares = await ready_spares(template, 2)
        child = template.fork()
        assert await ask(child, "7") == "7"
        assert child.pid in spares
        template.close()
        assert await template.wait() == 0

    arun(main)


@pytest.mark.unprivileged
def test_spares_that_are_there_serve_on(arun):
    """A start that finds one needs no fork."""

    async def main():
        template = afork.Fork.new_exec()
        refusal = NoProcesses(template)
        await refusal.start()
        template.eval(ASK).spares(2)
        await template.ready()
        spares = await ready_spares(template, 2)
        await refusal.refuse()
        for _ in range(2):
            child = template.fork()
            assert await ask(child, "7") == "7"
            assert child.pid in spares
            assert await child.wait() == 0
        with pytest.raises(BlockingIOError):
            await template.fork().run("quit")
        await refusal.allow()
        assert await ready_spares(template, 2, spares)
        template.close()
        assert await template.wait() == 0

    arun(main)


@pytest.mark.unprivileged
def test_a_spare_that_dies_then_is_no_way_out(arun):
    """Its request cannot go to a fork either: whoever asked is told."""

    async def main():
        template = afork.Fork.new_exec()
        refusal = NoProcesses(template)
        await refusal.start()
        template.eval(ASK).spares(1)
        await template.ready()
        (spare,) = await ready_spares(template, 1)
        await refusal.refuse()
        os.kill(spare, signal.SIGSTOP)
        run = asyncio.ensure_future(ask(template.fork(), "7"))
        await template.ready()  # it has been handed over
        os.kill(spare, signal.SIGKILL)
        with pytest.raises(BlockingIOError):
            await run
        await refusal.allow()
        assert await ask(template.fork(), "7") == "7"
        template.close()
        assert await template.wait() == 0

    arun(main)


# -- the application's own forks

APPLICATION = f"""
import asyncio, errno, os, shutil, sys
import afork, afork._interpreter, afork._default, afork._main_template
from afork import _process, _subprocess
{NOBODY}
kind = sys.argv[1]
home = os.open("/proc/self/ns/pid", os.O_RDONLY)
if kind == "ENOMEM":
    assert libc.unshare({NEWPID}) == 0
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
else:
    become_nobody()
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
before = sorted(os.listdir("/proc/self/fd"))
for make in (
    afork.Fork.new,
    afork.Fork.default,
    afork.Fork.new_exec,
    afork.fork_main,
    lambda: afork.Fork.new_exec(command=["cat"]),
    lambda: asyncio.run(afork.create_subprocess_exec("true")),
):
    try:
        made = make()
    except OSError as exc:
        assert exc.errno == getattr(errno, kind), exc
    else:
        sys.exit(f"{{make}}: {{made}}")
afork._default.shutdown()
left = set(os.listdir("/proc/self/fd")) - set(before)
assert len(left) <= 1, left  # the hub's

async def main():
    process = await afork.create_subprocess_exec("true")
    assert await process.wait() == 0
    await template.ready()
    template.close()
    await template.wait()

if kind == "ENOMEM":  # nobody may not be able to execute this Python
    assert libc.setns(home, {NEWPID}) == 0
    template = afork.fork_main()
    asyncio.run(main())
"""


@pytest.mark.parametrize(
    "kind",
    [pytest.param("EAGAIN", marks=pytest.mark.unprivileged), "ENOMEM"],
)
def test_the_application_cannot_fork(run_script, kind):
    if kind == "ENOMEM":
        need("root", os.geteuid() == 0, "only root can make a pid namespace")
    run_script(APPLICATION, kind)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a user without other processes")
@pytest.mark.parametrize("room", [1, 3])
def test_a_pool_makes_do_with_the_processes_there_can_be(arun, room):
    """One at a time if need be, each started when the one before has gone."""

    async def main():
        async with afork.Pool(max=10, max_calls=3) as pool:
            template = pool.template.require("resource", "traceback", "signal")
            template.eval(
                "import os; os.setuid(int(args[0]))", str(500_000 + os.getpid())
            )
            limit = (1 + room, 1 + room)
            template.set(rlimits={resource.RLIMIT_NPROC: limit})
            calls = [pool.call(abs, -n) for n in range(30)]
            assert await asyncio.gather(*calls) == list(range(30))

    arun(main)
