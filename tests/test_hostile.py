"""Hostile peers: one error, inside fixed caps (promise P6).

The peer is a process that speaks on a socket which the application takes for
that of a process of afork; see scripts/fault_hostile.py.
"""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import afork

from .conftest import open_descriptors, read_all
from .scripts.fault_tools import ECHO, log, rss  # noqa: F401 - fixture

SCRIPT = Path(__file__).parent / "scripts" / "fault_hostile.py"


@contextlib.contextmanager
def hostile(*args):
    """A process object with a hostile peer."""
    ours, theirs = socket.socketpair()
    kind, *more = args
    command = [sys.executable, "-I", "-S", str(SCRIPT), kind, str(theirs.fileno())]
    with theirs:
        peer = subprocess.Popen([*command, *more], pass_fds=[theirs.fileno()])
    try:
        f = afork.Fork.new_from_fh(ours)
        yield f
        with contextlib.suppress(ProcessLookupError):
            f.kill()
    finally:
        peer.kill()
        peer.wait()


async def next_request_works():
    f = afork.Fork.new().eval(ECHO)
    assert await read_all(await f.run("echo")) == b"()"


PROTOCOL = [
    "garbage",
    "length",
    "over",
    "fds0",
    "fds2",
    "fds3",
    "fds250",
    "fds253",
    "stray1",
    "stray2",
    "stray250",
    "behind",
    "nopidfd",
    "nopidfd-file",
    "pid",
    "error",
    "fields",
    "running",
    "after-garbage",
    *(f"size-{letter}-{n}" for letter in "nxdfb" for n in (0, 1, 7, 200)),
    "size-?-0",
    "size-e-0",
]


def test_nonsense_is_a_protocol_error(arun):
    async def main():
        fds = len(open_descriptors())
        for kind in PROTOCOL:
            print(kind)  # the last one is the culprit
            with hostile(kind) as f:
                with pytest.raises(afork.ProtocolError):
                    await f.ready()
                # The same for whatever is asked later.
                with pytest.raises(afork.ProtocolError):
                    await f.eval("pass").run("os.getpid")
            del f
            assert len(open_descriptors()) <= fds + 4
        await next_request_works()

    arun(main)


def test_an_early_end_is_a_lost_process(arun):
    async def main():
        for kind in ("close", "half", "head", "first"):
            print(kind)
            with hostile(kind) as f, pytest.raises(afork.WorkerLost):
                await f.ready()
        await next_request_works()

    arun(main)


def test_errors_may_say_anything(arun):
    async def main():
        with hostile("text") as f, pytest.raises(afork.RemoteError) as info:
            await f.ready()
        assert info.value.type == "Bad\ufffd"
        with hostile("errno") as f, pytest.raises(OSError, match=r"9|^"):
            await f.ready()

    arun(main)


def test_running_says_it_once(arun):
    async def main():
        with hostile("running-twice") as f:
            sock = await f.run("anything")
            assert await read_all(sock) == b"r\0\0\0\0"
        with hostile("error-running") as f, pytest.raises(afork.RemoteError):
            await f.run("anything")
        with hostile("running") as f:
            f.run("anything")  # and nobody awaits it
            await f._process.until(lambda: f._process.running)

    arun(main)


def test_a_process_that_announces_and_does_not_send_costs_nothing(arun):
    async def main():
        before = rss()
        with hostile("slow") as f:
            await f._process.until(lambda: not f._process.channel.queued)
            f.eval("x = 1")
            assert rss() - before < 4 << 20
            f.close()

    arun(main)


@pytest.mark.parametrize("kind", ["unknown-ids", "duplicates"])
def test_unknown_and_repeated_ids_are_nothing(arun, kind):
    async def main():
        with hostile(kind) as f:
            fds = len(open_descriptors())
            await f._process.until(lambda: f.pid is not None)
            pid = f.pid
            await f.ready()  # they end with an answer to everything
            assert len(open_descriptors()) <= fds + 1
            assert f.pid == pid
            f.close()
        await next_request_works()

    arun(main)


@pytest.mark.parametrize("lie", ["failed", "exited", "exited-twice", "spawned"])
def test_a_template_that_lies_about_its_children(arun, lie):
    async def main():
        with hostile("template", lie) as f:
            child = f.fork()
            fds = len(open_descriptors())
            with pytest.raises((afork.AforkError, OSError)):
                await child.run("os.getpid")
            with contextlib.suppress(afork.AforkError, OSError):
                await child.wait()
            assert child.returncode in (None, -9)
            assert len(open_descriptors()) <= fds + 1
            assert repr(child)
            assert child.rusage is None or child.rusage
        await next_request_works()

    arun(main)


def test_endless_reports_do_not_keep_the_loop_nor_memory(arun):
    async def main():
        await next_request_works()
        before, fds = rss(), len(open_descriptors())
        with hostile("endless"):
            for _ in range(3):
                await next_request_works()
            assert rss() - before < 4 << 20
            assert len(open_descriptors()) <= fds + 2

    arun(main)


def test_endless_big_reports_stay_below_the_cap(arun):
    async def main():
        await next_request_works()
        before = rss()
        with hostile("endless-big") as f:
            with pytest.raises(afork.RemoteError):
                await f.ready()
            for _ in range(3):
                await next_request_works()
                # One report of 8 MiB as it grows, and one as an object.
                assert rss() - before < 40 << 20

    arun(main)


def test_endless_descriptors_are_closed_as_they_come(arun):
    async def main():
        await next_request_works()
        fds = len(open_descriptors())
        with hostile("endless-fds") as f:
            await f._process.until(lambda: f.pid is not None)
            for _ in range(3):
                await next_request_works()
                assert len(open_descriptors()) <= fds + 20

    arun(main)


@pytest.mark.parametrize("round", range(8))
def test_random_reports(arun, round):
    seed = random.randrange(1 << 32)
    print("seed", seed)

    async def main():
        with hostile("random", str(seed)) as f:
            child = f.fork()
            for awaitable in (child.run("x"), f.ready(), f.wait()):
                try:
                    sock = await awaitable
                except (afork.AforkError, OSError):
                    pass
                else:
                    if isinstance(sock, socket.socket):
                        sock.close()
        await next_request_works()

    arun(main)


def test_garbage_from_our_own_child_ends_it(arun, tmp_path):
    script = tmp_path / "python"
    script.write_text(
        '#!/bin/sh\nprintf "nonsense...................." >&3\nexec sleep 1000\n'
    )
    script.chmod(0o755)

    async def main():
        f = afork.Fork.new_exec(python=script)
        with pytest.raises(afork.ProtocolError):
            await f.ready()
        assert await f.wait() == -9

    arun(main)
