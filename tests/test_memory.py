"""Huge pages: when a template gets them, and what happens where it does not."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import afork
from afork import _afork, _memory

from .conftest import need
from .scripts.api_ask import ask, ended, read_all
from .scripts.memory_tools import DATA, SCAN, huge_pages, stats


@pytest.fixture
def loop_factory():
    """What happens in the template is the same for every kind of loop."""
    return asyncio.new_event_loop


@pytest.fixture
def collapse():
    found = _afork.huge_pages()
    need("collapse", found == "ok", f"the kernel cannot collapse: {found}")


WAIT = "def wait(sock): sock.recv(1)"


def test_a_large_template_moves_into_huge_pages(arun, collapse):
    async def main():
        template = afork.Fork.new_exec().eval(DATA + SCAN)
        expected = await ask(template.fork(), "scan()")
        found = await stats(template.fork())
        assert found["collapse"] == "used", found
        assert found["collapsed_bytes"] > 40 << 20
        assert found["arena_bytes"] > 10 << 20
        assert huge_pages(template.pid) > 40 << 20
        # What the workers read is what was written.
        assert await ask(template.fork(), "scan()") == expected
        template.close()

    arun(main)


PRIVATE = """
def private_of_file():
    with open("/proc/self/smaps") as file:
        ours = False
        n = 0
        for line in file:
            if "-" in line.split(" ", 1)[0]:
                ours = "/memfd:afork heap" in line
            elif ours and line.startswith(("Private_Clean", "Private_Dirty")):
                n += int(line.split()[1])
    return n
"""


@pytest.mark.parametrize("made", ["new", "new_exec"])
def test_python_objects_move_into_a_file(arun, collapse, made):
    """Of which a fork copies no page tables."""

    async def main():
        template = getattr(afork.Fork, made)().eval(DATA + SCAN + PRIVATE)
        template.eval("def write():\n    for item in data: item['id'] += 1")
        template.eval("def both(): write(); return scan()")
        expected = await ask(template.fork(), "scan()")
        found = await stats(template.fork())
        assert found["file_bytes"] > 10 << 20, found
        assert found["file_errno"] == 0
        assert found["collapsed_bytes"] >= found["file_bytes"]
        maps = Path(f"/proc/{template.pid}/maps").read_text()
        assert "/memfd:afork heap" in maps
        assert not [
            link
            for link in os.listdir(f"/proc/{template.pid}/fd")
            if "afork heap" in os.readlink(f"/proc/{template.pid}/fd/{link}")
        ]
        # What a worker does not write is shared, or nobody else has it mapped:
        # not all of it by far. What it writes is its own.
        kb = await ask(template.fork(), "private_of_file()")
        assert kb << 10 < found["file_bytes"] / 2
        assert await ask(template.fork(), "both()") == expected + 13_000
        assert await ask(template.fork(), "scan()") == expected
        # And what is given back can be used again.
        again = "data.clear() or exec('data += [str(i) for i in range(300_000)]')"
        assert await ask(template.fork(), f"{again} or len(data)") == 300_000
        template.close()

    arun(main)


def test_what_is_loaded_later_moves_too(arun, collapse):
    async def main():
        template = afork.Fork.new_exec().eval(DATA + SCAN)
        expected = await ask(template.fork(), "scan()")
        first = (await stats(template.fork()))["file_bytes"]
        while (await template.stats())["children"]:
            pass  # while one lives, nothing is moved
        template.eval("more, data = data, []").eval(DATA)
        assert await ask(template.fork(), "scan()") == expected
        found = await stats(template.fork())
        assert found["collapse"] == "used"
        assert found["file_bytes"] > first + (5 << 20), (first, found)
        template.close()

    arun(main)


def test_a_template_of_a_template_moves_its_own(arun, collapse):
    async def main():
        template = afork.Fork.new_exec().eval(DATA + SCAN)
        expected = await ask(template.fork(), "scan()")
        second = template.fork().eval(DATA.replace("data", "more"))
        assert await ask(second.fork(), "scan()") == expected
        found = await stats(second.fork())
        assert found["file_bytes"] > 5 << 20, found
        assert await ask(second.fork(), "len(more)") == 13_000
        second.close()
        assert await ask(template.fork(), "scan()") == expected
        template.close()

    arun(main)


def test_threads_keep_it_where_it_is(arun, collapse):
    """They might write between the copy and its mapping."""

    async def main():
        template = afork.Fork.new_exec().eval(DATA + SCAN)
        template.eval("import threading; stop = threading.Event()")
        template.eval("threading.Thread(target=stop.wait, daemon=True).start()")
        assert await ask(template.fork(), "scan()") > 0
        found = await stats(template.fork())
        assert (found["collapse"], found["file_bytes"]) == ("used", 0), found
        template.close()

    arun(main)


@pytest.mark.parametrize("how", ["limit", "switch"])
def test_without_a_file(arun, collapse, monkeypatch, how):
    """The limit of a file's size is one of memory files, too."""
    if how == "switch":
        monkeypatch.setenv(_memory.VARIABLE, "file")

    async def main():
        template = afork.Fork.new_exec().eval(DATA + SCAN)
        if how == "limit":
            template.eval("import resource, signal")
            template.eval("signal.signal(signal.SIGXFSZ, signal.SIG_DFL)")
            template.eval("resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, -1))")
        assert await ask(template.fork(), "scan()") > 0
        found = await stats(template.fork())
        assert found["collapse"] == "used", found
        assert found["file_bytes"] == (4 << 20 if how == "limit" else 0), found
        assert found["file_errno"] == (errno.EFBIG if how == "limit" else 0)
        assert huge_pages(template.pid) > 40 << 20
        template.close()

    arun(main)


#: In as many interpreters as possible at once: each with a GIL of its own.
INTERPRETERS = """
import threading
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters

WORK = '''
for _ in range(10):
    data = [(i, str(i)) for i in range(100_000)]
    assert all(a == int(b) for a, b in data)
    del data
'''

def work():
    interpreter = interpreters.create()
    failed = interpreters.run_string(interpreter, WORK)
    interpreters.destroy(interpreter)
    if failed is None:
        good.append(interpreter)

good = []
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
exec(WORK)
for thread in threads:
    thread.join()
"""


def test_interpreters_do_not_share_arenas(arun):
    """Those with a GIL of their own would take the same ones at once."""

    async def main():
        template = afork.Fork.new_exec().eval(INTERPRETERS)
        assert await ask(template.fork(), "len(good)") == 4
        template.close()

    arun(main)


def test_forks_leave_the_huge_pages_whole(arun, collapse):
    """The loop writes nowhere in them: each write would split one for good."""

    async def main():
        template = await afork.Fork.new_exec().eval(DATA + WAIT).ready()
        living = [await template.fork().run("wait")]
        first = huge_pages(template.pid)
        assert first > 40 << 20
        for _ in range(40):
            living.append(await template.fork().run("wait"))
            (await template.fork().run("wait")).close()
        assert huge_pages(template.pid) >= first - (2 << 20)
        for sock in living:
            sock.close()
        template.close()

    arun(main)


def test_a_small_template_is_left_alone(arun):
    async def main():
        template = afork.Fork.new_exec()
        found = await stats(template.fork())
        assert found["collapse"] == "small"
        assert found["huge_bytes"] <= 2 << 20  # on kernels that always make them
        assert found["gc_frozen"] > 1000
        assert (found["frozen"], found["immortal"]) == (False, "not asked for")
        template.close()

    arun(main)


def test_what_is_loaded_later_is_moved_when_no_child_lives(arun, collapse):
    async def main():
        template = afork.Fork.new_exec().eval(WAIT)
        f = template.fork()
        sock = await f.run("wait")
        template.eval(DATA + SCAN)
        assert (await stats(template.fork()))["collapse"] == "small"
        sock.close()
        assert await f.wait() == 0
        # The worker that was asked may be a child still, when the next one is.
        for _ in range(100):
            g = template.fork()
            if (await stats(g))["collapse"] == "used":
                break
            await g.wait()
        else:
            pytest.fail("not moved")
        template.close()

    arun(main)


@pytest.mark.parametrize("off", [*_memory.OFF, ",".join(_memory.OFF)])
def test_each_can_be_missing(arun, monkeypatch, off):
    monkeypatch.setenv(_memory.VARIABLE, off)

    async def main():
        template = afork.Fork.new_exec().eval(DATA + SCAN)
        if "immortal" in off:
            template.freeze()
        assert await ask(template.fork(), "scan()") > 0
        found = await stats(template.fork())
        if "arena" in off:
            assert found["arenas"] == 0
        if "collapse" in off:
            assert (found["collapse"], found["collapsed_bytes"]) == ("switched off", 0)
        if off == "gc":
            assert found["gc_frozen"] < 1000  # immortal ones
        if "immortal" in off:
            assert (found["immortal"], found["immortal_objects"]) == ("switched off", 0)
            assert found["gc_frozen"] > 1000
        template.close()

    arun(main)


def test_a_kernel_that_refuses(arun, collapse):
    """PR_SET_THP_DISABLE: no huge page for this process."""

    async def main():
        template = afork.Fork.new_exec().require("ctypes")
        template.eval("ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)").eval(DATA + SCAN)
        assert await ask(template.fork(), "scan()") > 0
        found = await stats(template.fork())
        if found["collapse"] == "used":
            pytest.skip("this kernel collapses all the same")
        assert found["collapse"] == "refused"
        assert found["collapse_errno"] == errno.EINVAL
        assert found["refused_bytes"] > 40 << 20
        assert huge_pages(template.pid) == 0
        template.close()

    arun(main)


def test_a_system_that_wants_none(tmp_path):
    """`never`, said by a file that is mounted over the kernel's."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    (tmp_path / "program.py").write_text(
        f"""
import asyncio, sys
sys.path.append({str(Path(__file__).parents[1])!r})
import afork, afork._afork
from tests.scripts.memory_tools import *

async def main():
    template = afork.Fork.new_exec().eval(DATA + SCAN)
    assert await ask(template.fork(), "scan()") > 0
    found = await stats(template.fork())
    assert found["collapse"] == "no huge pages", found
    assert (found["arenas"], found["huge_bytes"]) == (0, 0), found
    assert await ask(template.fork(), "'GLIBC_TUNABLES' in os.environ") == False

assert afork._afork.huge_pages() == "no huge pages"
asyncio.run(main())
"""
    )
    script = f'mount --bind {tmp_path}/enabled {setting} && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh"]
    possible = (
        setting.exists()
        and not subprocess.run([*command, "true"], capture_output=True).returncode
    )
    need("mounts", possible, "nothing can be mounted here")
    done = subprocess.run(
        [*command, sys.executable, tmp_path / "program.py"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(afork.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr


# -- glibc's heap


@pytest.mark.parametrize(
    ("theirs", "given"),
    [
        (None, b"glibc.malloc.hugetlb=1"),
        (b"", b"glibc.malloc.hugetlb=1"),
        (
            b"glibc.malloc.arena_max=2",
            b"glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1",
        ),
        (b"glibc.malloc.hugetlb=0", b"glibc.malloc.hugetlb=0"),
    ],
)
def test_tunables_are_merged(theirs, given):
    assert _memory.tunables(theirs) == given


@pytest.mark.parametrize("theirs", [None, "glibc.malloc.arena_max=2"])
@pytest.mark.parametrize("old", [True, False])
def test_tunable_is_for_the_template_alone(arun, monkeypatch, theirs, old):
    """Where the kernel cannot collapse; and gone from what workers inherit."""
    monkeypatch.setattr(_afork, "huge_pages", lambda: "old kernel" if old else "ok")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if theirs:
        monkeypatch.setenv("GLIBC_TUNABLES", theirs)

    async def main():
        template = await afork.Fork.new_exec().ready()
        # glibc cuts the string at its colons when it reads it.
        environ = Path(f"/proc/{template.pid}/environ").read_bytes()
        environ = environ.replace(b"\0", b":")
        ours = (theirs or "").encode()
        if old:
            assert b"GLIBC_TUNABLES=" + _memory.tunables(ours) in environ
        else:
            assert b"hugetlb" not in environ
        what = "os.environ.get('GLIBC_TUNABLES')"
        assert await ask(template.fork(), what) == theirs
        sock = await template.fork().exec("env", stdout=afork.SOCKET)
        lines = (await read_all(sock)).decode().splitlines()
        left = [x for x in lines if x.startswith("GLIBC_TUNABLES=")]
        assert left == ([f"GLIBC_TUNABLES={theirs}"] if theirs else [])
        template.close()

    arun(main)
    assert os.environ.get("GLIBC_TUNABLES") == theirs


# -- little memory


def test_no_room_for_a_slab(arun):
    """Arenas are mapped one by one where 64 MiB are too much to ask for."""

    async def main():
        template = afork.Fork.new_exec().require("resource", "re")
        template.eval(
            """
            with open("/proc/self/status") as file:
                size = int(re.search(r"VmSize:\\s+(\\d+)", file.read())[1]) << 10
            resource.setrlimit(resource.RLIMIT_AS, (size + (80 << 20),) * 2)
            """
        )
        template.eval(DATA.replace("14_000", "9_000") + SCAN)
        assert await ask(template.fork(), "scan()") > 0
        # And what is too much altogether is an error of that process only.
        f = template.fork().eval("x = bytes(200 << 20)")
        with pytest.raises(afork.RemoteError) as info:
            await f.ready()
        assert info.value.type == "MemoryError"
        assert await ask(template.fork(), "scan()") > 0
        template.close()

    arun(main)


@pytest.mark.parametrize("freeze", [True, False])
def test_fork_refused_for_lack_of_memory(arun, freeze):
    """ENOMEM: the kernel's answer when a pid namespace has lost its first process."""
    need("root", os.geteuid() == 0, "only root can make a pid namespace")

    async def main():
        template = afork.Fork.new_exec().require("ctypes").eval(DATA)
        if freeze:
            template.freeze()
        template.eval("unshared = ctypes.CDLL(None).unshare(0x20000000)")
        # It sees no parent there and ends at once.
        with pytest.raises(afork.WorkerLost):
            await template.fork().run("os.getpid")
        for _ in range(3):
            with pytest.raises(OSError, match="Cannot allocate memory") as info:
                await template.fork().run("os.getpid")
            assert info.value.errno == errno.ENOMEM
        await template.ready()  # it lives
        pid = template.pid
        template.close()
        assert ended(pid)

    arun(main)


def test_limits_of_the_application_reach_the_template(arun):
    """A setting of the test above: RLIMIT_AS is inherited by what is forked."""

    async def main():
        limit = 4 << 30
        f = afork.Fork.new_exec().set(rlimits={resource.RLIMIT_AS: (limit, limit)})
        f.require("resource")
        what = "resource.getrlimit(resource.RLIMIT_AS)"
        assert await ask(f.fork(), what) == (limit, limit)
        f.close()

    arun(main)


# -- main programs


def test_main_program_is_moved_before_it_is_forked(run_script, tmp_path, collapse):
    path = tmp_path / "main.py"
    path.write_text(
        f"""
import sys
sys.path.append({str(Path(__file__).parents[1])!r})
from tests.scripts.memory_tools import DATA, SCAN, huge_pages, stats
exec(DATA + SCAN)
from afork.template import TEMPLATE
import asyncio
from tests.scripts.api_ask import ask

async def main():
    assert await ask(TEMPLATE.fork(), "scan()") == scan()
    assert huge_pages(TEMPLATE.pid) > 20 << 20
    found = await stats(TEMPLATE.fork())
    assert found["collapse"] == "used", found

if __name__ == "__main__":
    asyncio.run(main())
"""
    )
    done = subprocess.run(
        [sys.executable, path],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(afork.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
