"""The interpreter's text in a template: arranged once it has made some workers."""

from __future__ import annotations

import asyncio
import re
import resource
from pathlib import Path

import pytest

import afork
from afork import _afork, _memory

from .conftest import need
from .scripts.api_ask import ask
from .scripts.memory_tools import DATA, huge_pages, stats

STARTS = 32  # those before the trial
LEAVE = "builtins.id"


def text_of(pid: int) -> dict[str, tuple[int, int]]:
    """File to kB of its text that are mapped and private."""
    found = {}
    name = None
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if head := re.match(r"\S+-\S+ (\S+) \S+ \S+ (\d+) *(.*)", line):
            name = head[3] if head[1] == "r-xp" and head[2] != "0" else None
        elif name and line.startswith("Rss:"):
            resident = int(line.split()[1])
        elif name and line.startswith("Anonymous:"):
            found[name] = resident, int(line.split()[1])
    return found


@pytest.fixture
def loop_factory():
    """What happens in the template is the same for every kind of loop."""
    return asyncio.new_event_loop


async def start(template: afork.Fork, n: int) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(n):
        with await template.fork().run(LEAVE) as sock:
            assert await loop.sock_recv(sock, 1) == b""


async def arranged(template: afork.Fork) -> dict:
    """Statistics once the trial is over: its end is seen at the next start."""
    for _ in range(1000):
        found = await stats(template.fork())
        if found["text"] not in ("not yet", "trial"):
            return found
    pytest.fail(f"the trial does not end: {found}")


@pytest.fixture
def may_write_text():
    """A kernel may forbid the way in which text is made private."""
    try:
        with open("/proc/self/pagemap", "rb") as file:
            file.read(8)
    except OSError as error:
        pytest.skip(f"no page map: {error}")


def test_text_that_workers_use_is_private(arun, may_write_text):
    async def main():
        template = afork.Fork.new_exec()
        await template.ready()
        assert (await stats(template.fork()))["text"] == "not yet"
        await start(template, STARTS)
        found = await arranged(template)
        assert found["text"] == "used", found
        private = sum(p for _, p in text_of(template.pid).values())
        assert 0 < private << 10 == found["text_bytes"] < 2 << 20
        template.close()

    arun(main)


def test_huge_pages_stay_whole(arun, may_write_text):
    """A trial beside workers that live: each write in one would split it."""
    huge = _afork.huge_pages()
    need("collapse", huge == "ok", f"the kernel cannot collapse: {huge}")

    async def main():
        template = afork.Fork.new_exec().eval(DATA)
        template.eval("def wait(sock): sock.recv(1)")
        living = [await template.fork().run("wait")]
        first = huge_pages(template.pid)
        assert first > 40 << 20
        await start(template, STARTS)
        found = await arranged(template)
        assert (found["collapse"], found["text"]) == ("used", "used"), found
        private = sum(p for _, p in text_of(template.pid).values())
        assert 0 < private << 10 == found["text_bytes"]
        assert huge_pages(template.pid) == first
        living.pop().close()
        template.close()

    arun(main)


def test_workers_take_fewer_faults(arun, may_write_text):
    async def faults(template):
        return await ask(
            template.fork(),
            f"__import__('resource').getrusage({resource.RUSAGE_SELF}).ru_minflt",
        )

    async def main():
        template = afork.Fork.new_exec().require("resource")
        before = await faults(template)
        await start(template, STARTS)
        assert (await arranged(template))["text"] == "used"
        assert await faults(template) < before
        template.close()

    arun(main)


def test_a_template_whose_starts_all_find_a_spare(arun, may_write_text):
    """It forks only in between: then it finds out, and later spares profit."""

    async def main():
        template = await afork.Fork.new_exec().spares(2).ready()
        for _ in range(STARTS):
            while not (await template.stats())["spares"]["ready"]:
                pass
            await start(template, 1)
        assert (await template.stats())["spares"]["misses"] == 0
        assert (await arranged(template))["text"] == "used"
        template.close()

    arun(main)


def test_what_code_uses_later_is_not_copied(arun, may_write_text):
    """After an eval the template drops what text that has mapped."""

    async def main():
        template = afork.Fork.new_exec()
        await start(template, STARTS)
        await arranged(template)
        name = max(text_of(template.pid), key=lambda n: text_of(template.pid)[n][1])
        template.eval(
            "import json, re\njson.loads(json.dumps([1.5, {'a': re}.keys().__len__()]))"
        )
        await template.ready()
        resident, private = text_of(template.pid)[name]
        assert resident > private
        await start(template, 1)
        resident, private = text_of(template.pid)[name]
        # Only what the loop touches once more, 64 kB each.
        assert resident <= private + 10 * 64
        template.close()

    arun(main)


def test_switched_off(arun, monkeypatch):
    monkeypatch.setenv(_memory.VARIABLE, "text")

    async def main():
        template = afork.Fork.new_exec()
        await start(template, STARTS + 4)
        found = await stats(template.fork())
        assert (found["text"], found["text_bytes"]) == ("switched off", 0)
        assert not sum(p for _, p in text_of(template.pid).values())
        template.close()

    arun(main)


def test_the_copy_is_killed(arun):
    """The trial has no result, and the template goes on."""

    async def main():
        template = afork.Fork.new_exec().require("os", "signal")
        # Only the worker of the copy is no child of the template.
        template.eval(
            "mine = os.getpid()\n"
            "def die():\n"
            "    if os.getppid() != mine: os.kill(os.getpid(), signal.SIGKILL)\n"
            "os.register_at_fork(after_in_child=die)\n"
        )
        await start(template, STARTS)
        found = await arranged(template)
        assert found["text"] == "refused", found
        assert found["text_errno"], found
        await start(template, 2)
        template.close()

    arun(main)


def test_the_trial_is_no_child_that_anybody_hears_of(arun):
    async def main():
        template = afork.Fork.new_exec()
        children = [template.fork() for _ in range(STARTS + 8)]
        for child in children:
            (await child.run(LEAVE)).close()
        assert {await child.wait() for child in children} == {0}
        template.close()
        assert await template.wait() == 0

    arun(main)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_breakpoint_stays(arun, may_write_text, when):
    """Text that somebody has written to is left alone."""
    breakpoint = (
        "at = ctypes.cast(ctypes.pythonapi.Py_GetCopyright, ctypes.c_void_p).value\n"
        "with open('/proc/self/mem', 'r+b', 0) as mem:\n"
        "    mem.seek(at); byte = mem.read(1); mem.seek(at); mem.write(b'\\xcc')\n"
    )

    async def main():
        template = afork.Fork.new_exec().require("ctypes", "os")
        if when == "before":
            template.eval(breakpoint)
        await start(template, STARTS)
        await arranged(template)
        if when == "after":
            template.eval(breakpoint)
        assert await ask(template.fork(), "ctypes.string_at(at, 1)") == b"\xcc"
        template.close()

    arun(main)
