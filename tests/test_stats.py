"""stats(): what a process tells of itself; ps and tree: what procfs tells."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

import afork
from afork import _ps, _stats


def test_of_a_template(arun):
    async def main():
        f = afork.Fork.new_exec().send_arg("a", b"b").send_fh(0)
        child = f.fork()
        await child.ready()
        told = await f.stats()
        assert told["pid"] == f.pid
        assert told["state"] == "serving"
        assert (told["starts"], told["children"]) == (1, 1)
        assert (told["arguments"], told["handles"]) == (3, 1)
        assert told["detached"] is False
        assert told["threads"] == told["inherited"] == []
        assert told["age"] >= 0
        assert told["at_fork"]["modules"] == []
        assert told["at_fork"]["after_in_child"] == 0
        assert 0 < told["memory"]["pss"] <= told["memory"]["rss"]
        assert (await child.stats())["pid"] == child.pid
        for each in (child, f):
            each.close()
            assert await each.wait() == 0

    arun(main)


def test_what_makes_forks_dear_is_named(arun):
    async def main():
        f = (
            afork.Fork.new_exec()
            .require("random")
            .eval(
                """
            import os, threading, time
            os.register_at_fork(before=int, after_in_parent=int)
            threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
            """
            )
        )
        told = await f.stats()
        assert {"random", "threading", "__main__"} <= set(told["at_fork"]["modules"])
        assert told["at_fork"]["before"] >= 1
        assert told["at_fork"]["after_in_child"] >= 2
        assert len(told["threads"]) == 1
        f.kill()
        assert await f.wait() == -9

    arun(main)


def test_of_spares(arun):
    async def main():
        f = afork.Fork.new_exec().spares(2)
        await f.ready()
        # Two requests at a time leave the template no idle millisecond, and it
        # makes them nevertheless.
        ready = 0
        while ready < 2:
            told, _ = await asyncio.gather(f.stats(), f.stats())
            ready = told["spares"]["ready"]
        assert told["children"] == 0
        child = f.fork()
        await child.ready()
        told = await f.stats()
        assert (told["spares"]["hits"], told["spares"]["misses"]) == (1, 0)
        assert told["starts"] == 1
        for each in (child, f):
            each.close()
            assert await each.wait() == 0

    arun(main)


def test_after_an_error_and_after_the_end(arun):
    async def main():
        f = afork.Fork.new_exec().eval("1 / 0")
        assert (await f.stats())["state"] == "failed"
        with pytest.raises(afork.RemoteError):
            await f.ready()
        f.kill()
        assert await f.wait() == -9
        with pytest.raises(afork.RemoteError):
            await f.stats()
        g = afork.Fork.new_exec()
        await g.ready()
        g.kill()
        with pytest.raises(afork.TemplateError):
            await g.stats()

    arun(main)


def test_open_descriptors_of_a_main_template(run_script):
    out = run_script(
        """
import asyncio, os, afork
r, w = os.pipe()
template = afork.fork_main()
os.close(r)

async def main():
    told = await template.stats()
    print(told["inherited"])
    template.close()
    await template.wait()

asyncio.run(main())
"""
    ).stdout
    assert out.count("pipe:[") == 2


@pytest.mark.parametrize(
    "value", [0, -5, 1 << 70, 1.5, True, False, None, "t\u00e9xt", "", ["a", ""], []]
)
def test_values_arrive_as_they_were(value):
    payload = _stats._afork.pack_strings([*_stats._flat("", {"a": {"b": value}})])
    told = _stats.decode(payload)["a"]["b"]
    assert told == value
    assert type(told) is type(value)


@pytest.mark.parametrize("payload", [b"\1a", b"\1a\2x1", b"\1a\2ix", b"\5a"])
def test_nonsense_is_refused(payload):
    with pytest.raises(ValueError):  # noqa: PT011
        _stats.decode(payload)


@pytest.mark.parametrize("command", ["ps", "tree"])
def test_command(arun, command):
    async def main():
        f = afork.Fork.new_exec().eval("def wait(sock): sock.recv(1)")
        child = f.fork()
        sock = await child.run("wait")
        done = subprocess.run(
            [sys.executable, "-P", "-m", "afork", command],
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert done.returncode == 0, done.stderr
        heading, *rows = done.stdout.splitlines()
        assert len({line.rstrip() for line in rows}) == len(rows)
        assert ("title" in heading.split()) == (command == "ps")
        words = [line.split() for line in rows]
        lines = {int(first): " ".join(rest) for first, *rest in words}
        assert "template" in lines[f.pid]
        assert "worker wait" in lines[child.pid]
        if command == "tree":
            assert "application" in lines[os.getpid()]
        sock.close()
        assert await child.wait() == 0
        f.close()
        assert await f.wait() == 0

    arun(main)


def test_names_are_whole_at_any_depth(monkeypatch, capsys):
    found = {
        n: _ps.Found(n, n - 1, 1, f"template number {n}", "template")
        for n in range(1 << 23, (1 << 23) + 50)  # no such processes
    }
    for n, process in found.items():
        if n + 1 in found:
            process.children.append(found[n + 1])
    monkeypatch.setattr(_ps, "find", lambda: found)
    assert _ps.tree() == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    for line, n in zip(lines, found, strict=True):
        assert f"{n} template number {n}" in line


@pytest.mark.parametrize("command", ["ps", "tree"])
def test_command_whose_reader_has_gone(command):
    """As with ``| head -1``: no traceback."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "afork", command],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=20,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")
