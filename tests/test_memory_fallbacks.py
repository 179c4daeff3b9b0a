"""Kernels that lack what huge pages need, made by filters of system calls.

A seccomp filter answers madvise(2) as an older kernel would: what is tested is
what the code does with the answer, in the template and in the application.
"""

from __future__ import annotations

import asyncio
import errno
import os

import pytest

import afork

from .conftest import need
from .scripts.api_ask import PYTHONPATH, ask
from .scripts.memory_tools import DATA, SCAN, huge_pages, stats
from .test_memory import collapse as collapse

HUGEPAGE, COLLAPSE = 14, 25

#: refuse(advice, error, probes): madvise fails from here on, here and in children.
FILTER = """
import ctypes, os, struct
def refuse(advice, error, probes=True):
    madvise = {"x86_64": 28, "aarch64": 233}[os.uname().machine]
    program = [
        (0x20, 0, 0, 0),  # number of the call
        (0x15, 0, 5, madvise),
        (0x20, 0, 0, 32),  # third argument
        (0x15, 0, 3, advice),
        (0x20, 0, 0, 24),  # length
        (0x15, 0 if probes else 1, 0, 0),
        (0x06, 0, 0, 0x50000 | error),
        (0x06, 0, 0, 0x7FFF0000),
    ]
    code = b"".join(struct.pack("=HBBI", *x) for x in program)
    buffer = ctypes.create_string_buffer(code)
    whole = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None)
    return libc.prctl(38, 1, 0, 0, 0) == libc.prctl(22, 2, whole, 0, 0) == 0
"""


@pytest.fixture
def loop_factory():
    """What happens in the template is the same for every kind of loop."""
    return asyncio.new_event_loop


@pytest.fixture(autouse=True)
def machine():
    machine = os.uname().machine
    need("seccomp", machine in ("x86_64", "aarch64"), f"no filter for {machine}")


def filtered(*refusals):
    """A template of a kernel that refuses."""
    template = afork.Fork.new_exec().eval(FILTER)
    for advice, error, *probes in refusals:
        args = ", ".join(map(repr, (advice, error, *probes)))
        template.eval(f"assert refuse({args})")
    return template


def always() -> bool:
    with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
        return "[always]" in file.read()


@pytest.mark.parametrize("freeze", [False, True], ids=["", "frozen"])
def test_no_collapse(arun, collapse, freeze):
    """Before Linux 6.1: the arenas have huge pages from birth, that is all."""

    async def main():
        template = filtered((COLLAPSE, errno.EINVAL)).eval(DATA + SCAN)
        if freeze:
            template.freeze()
        assert await ask(template.fork(), "scan()") > 0
        found = await stats(template.fork())
        assert found["collapse"] == "old kernel", found
        assert (found["collapsed_bytes"], found["refused_bytes"]) == (0, 0)
        assert found["arena_bytes"] > 10 << 20
        assert huge_pages(template.pid) > 0
        told = (await template.stats())["allocator"]
        assert told["collapse"] == "old kernel"
        template.close()

    arun(main)


def test_no_huge_pages_from_birth(arun, collapse):
    """MADV_HUGEPAGE refused: what is there is collapsed all the same."""

    async def main():
        template = filtered((HUGEPAGE, errno.EINVAL)).eval(DATA + SCAN)
        assert await ask(template.fork(), "scan()") > 0
        found = await stats(template.fork())
        assert (found["collapse"], found["collapse_errno"]) == ("used", 0), found
        assert found["arena_bytes"] > 10 << 20
        assert huge_pages(template.pid) > 20 << 20
        template.close()

    arun(main)


def test_neither(arun, collapse):
    async def main():
        template = filtered((HUGEPAGE, errno.EINVAL), (COLLAPSE, errno.EINVAL))
        template.eval(DATA + SCAN)
        assert await ask(template.fork(), "scan()") > 0
        found = await stats(template.fork())
        assert found["collapse"] == "old kernel"
        assert always() or huge_pages(template.pid) == 0
        template.close()

    arun(main)


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EAGAIN])
def test_no_memory_to_collapse_into(arun, collapse, number):
    """As a memory cgroup at its limit, or a fragmented machine, answers."""

    async def main():
        template = filtered((COLLAPSE, number, False)).eval(DATA + SCAN)
        assert await ask(template.fork(), "scan()") > 0
        found = await stats(template.fork())
        assert (found["collapse"], found["collapse_errno"]) == ("refused", number)
        assert found["refused_bytes"] > 40 << 20
        assert await ask(template.fork(), "scan()") > 0
        template.close()

    arun(main)


def test_no_procfs(arun):
    """Nothing says how large it is, so nothing is done."""
    need("root", os.geteuid() == 0, "only root can change its root")

    async def main():
        template = (
            afork.Fork.new_exec().require("tempfile", "afork._stats").eval(DATA + SCAN)
        )
        template.eval("os = tempfile._os; os.chroot(tempfile.mkdtemp()); os.chdir('/')")
        template.eval("import sys\ndef work(sock): sock.sendall(b'%d' % scan())")
        template.freeze()
        for _ in range(2):
            loop = asyncio.get_running_loop()
            sock = await template.fork().run("work")
            assert int(await loop.sock_recv(sock, 100)) > 0
            sock.close()
        # What is not told is left out.
        told = await template.stats()
        assert not {"age", "threads"} & set(told)
        found = told["allocator"]
        assert found["collapse"] == "no procfs", found
        assert found["frozen"] is True
        template.close()

    arun(main)


@pytest.mark.parametrize("freeze", [False, True])
def test_under_a_limit_of_memory(arun, freeze):
    """It may fail where the memory is needed, and nowhere else."""

    async def main():
        failed = done = 0
        for extra in (0, 1 << 20, 200 << 20):
            template = afork.Fork.new_exec().require("resource", "re").eval(DATA + SCAN)
            # Something that takes the walk deep: it needs a stack of its own.
            template.eval(
                "wide = [(str(i),) for i in range(400_000)]; wide = tuple(wide)"
            )
            template.eval(
                f"""
                import gc; gc.collect()
                with open("/proc/self/status") as file:
                    size = int(re.search(r"VmSize:\\s+(\\d+)", file.read())[1]) << 10
                resource.setrlimit(resource.RLIMIT_AS, (size + {extra},) * 2)
                """
            )
            if freeze:
                template.freeze()
            try:
                assert await ask(template.fork(), "scan()") > 0
                assert await ask(template.fork(), "len(wide)") == 400_000
            except (afork.RemoteError, afork.WorkerLost, MemoryError, OSError) as exc:
                assert "MemoryError" in str(exc) or getattr(exc, "errno", 0) == 12, exc  # noqa: PT017
                failed += 1
            else:
                done += 1
            template.close()
            assert await template.wait() == 0
        assert done >= 1, (failed, done)

    arun(main)


@pytest.mark.parametrize("theirs", [None, "glibc.malloc.hugetlb=0"])
def test_the_application_sees_an_old_kernel(run_script, collapse, theirs):
    """Then glibc is asked for huge pages, unless the user has said otherwise."""
    env = {**os.environ, "PYTHONPATH": PYTHONPATH}
    env.pop("GLIBC_TUNABLES", None)
    if theirs:
        env["GLIBC_TUNABLES"] = theirs
    run_script(
        FILTER
        + f"""
assert refuse({COLLAPSE}, {errno.EINVAL})
import asyncio, sys
sys.path.append({PYTHONPATH.rpartition(":")[2]!r})
import afork, afork._afork, afork._memory
from pathlib import Path
from tests.scripts.api_ask import ask
from tests.scripts.memory_tools import DATA, SCAN, huge_pages, stats

assert afork._afork.huge_pages() == "old kernel"

async def main():
    template = await afork.Fork.new_exec().ready()
    environ = Path(f"/proc/{{template.pid}}/environ").read_bytes()
    # glibc cuts the string at its colons when it reads it.
    assert b"glibc.malloc.hugetlb={0 if theirs else 1}" in environ.replace(b"\\0", b":")
    template.eval(DATA + SCAN)
    assert await ask(template.fork(), "scan()") > 0
    found = await stats(template.fork())
    assert found["collapse"] == "old kernel", found
    assert huge_pages(template.pid) > 0
    left = await ask(template.fork(), "os.environ.get('GLIBC_TUNABLES')")
    assert left == {theirs!r}, left
    template.close()

asyncio.run(main())
""",
        env=env,
    )
