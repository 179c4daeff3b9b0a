"""What the test files of AnyEvent::Fork assert, t/00_load to t/04_tofrom."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import weakref

import pytest

import afork
import afork._default

from .conftest import read_all
from .scripts.api_ask import read_pipe

#: Without -X dev: on a busy machine asyncio would complain of slow callbacks.
FLAGS = ("-W", "error")


def test_00_load(run_script, tmp_path):
    """Client and server load in a plain program, and start nothing."""
    done = run_script(
        """
import os, threading
from pathlib import Path
fds = os.listdir("/proc/self/fd")
import afork, afork._serve, afork._child
afork.Fork
assert os.listdir("/proc/self/fd") == fds
assert Path(f"/proc/self/task/{os.getpid()}/children").read_text() == ""
assert threading.active_count() == 1
print("loaded")
""",
        cwd=tmp_path,
    )
    assert (done.stdout, done.stderr) == ("loaded\n", "")


def test_01_early(run_script):
    done = run_script("seed_early.py", flags=FLAGS)
    assert done.stdout == "ok from the process\nok from the application\n"
    assert done.stderr == ""


def test_02_template(run_script):
    done = run_script("seed_template.py", flags=FLAGS)
    assert done.stdout == (
        "ok from the process, prepared\nok from the application, too late\n"
    )
    assert done.stderr == ""


def test_03_new(arun):
    async def main():
        assert afork._default._default is None
        proc = afork.Fork.new()
        assert isinstance(proc, afork.Fork)
        assert afork._default._default is not None
        assert afork._default.early_template() is None

        reading, writing = os.pipe()
        proc.send_fh(writing)
        os.close(writing)
        proc.eval("def write(sock, out): out.write(b'abc'); sock.recv(1)")
        sock = await proc.run("write")
        readable = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(reading, readable.set_result, None)
        await readable
        asyncio.get_running_loop().remove_reader(reading)

        gone = weakref.ref(proc)
        del proc
        gc.collect()
        assert gone() is None
        sock.close()  # the worker ends, with the last copy of the write end
        assert await read_pipe(reading) == b"abc"

    arun(main)


def test_03_new_object_can_go_before_anything_has_been_run(arun):
    """Its process ends, and with it the last copy of what it was sent."""

    async def main():
        reading, writing = os.pipe()
        proc = afork.Fork.new().send_fh(writing)
        os.close(writing)
        await proc.ready()
        del proc
        gc.collect()
        assert await read_pipe(reading) == b""

    arun(main)


def test_03_new_objects_may_be_alive_when_the_program_dies(run_script, tmp_path):
    done = run_script(
        """
import sys
import afork
f = afork.Fork.new()
run = f.fork().eval("def work(sock): pass").run("work")
try:
    1 / 0
except ZeroDivisionError as exc:
    kept = exc
    raise
""",
        status=1,
        cwd=tmp_path,
    )
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert done.stderr.count("Error") == 1


RELAY = """
import afork, asyncio

CODE = '''
text = args[0]
def answer(sock, out):
    out.write(b"17" + text)
'''

async def relay(sock, *handles):
    for theirs, out, text in zip(handles[:2], handles[2:], (b"2", b"4"), strict=True):
        proc = afork.Fork.new_from_fh(theirs).send_fh(out).eval(CODE, text)
        out.close()
        flushed = await proc.to_fh()
        (await afork.Fork.new_from_fh(flushed).run("answer")).close()
    sock.sendall(b"relayed")
"""


def test_04_to_and_from(arun):
    """Two processes are handed to a third one, which configures and runs them."""

    async def main():
        first, second, third = (afork.Fork.new() for _ in range(3))
        first.eval("queued = True")
        one = await first.to_fh()  # busy
        two = await second.to_fh()  # idle
        for sock in (one, two):
            assert type(sock) is socket.socket
            assert sock.gettimeout() == 0
        for given in (first, second):
            with pytest.raises(afork.ClosedError, match=r"^eval after to_fh$"):
                given.eval("pass")
        await third.ready()

        pipes = [os.pipe(), os.pipe()]
        third.send_fh(one, two, *(writing for _, writing in pipes))
        one.close()
        two.close()
        for _, writing in pipes:
            os.close(writing)
        third.eval(RELAY)
        assert await read_all(await third.run("relay")) == b"relayed"
        assert await third.wait() == 0
        del first, second, third
        assert await read_pipe(pipes[0][0]) == b"172"
        assert await read_pipe(pipes[1][0]) == b"174"

    arun(main)
