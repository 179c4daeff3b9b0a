"""run: a function in a process of its own, and a socket to it."""

from __future__ import annotations

import asyncio
import os

import pytest

import afork

from .conftest import read_all

SHOW = """
def show(sock, *args):
    sock.sendall(repr(args).encode())
"""


def test_arguments_arrive_in_order_and_as_sent(arun):
    async def main():
        f = (
            afork.Fork.new()
            .eval(SHOW)
            .send_arg("text", b"bytes", "")
            .send_arg("ü\udcff")
        )
        return await read_all(await f.run("show"))

    assert arun(main) == repr(("text", b"bytes", "", "ü\udcff")).encode()


def test_unknown_function_is_raised_at_the_await(arun):
    async def main():
        with pytest.raises(afork.RemoteError, match="AttributeError") as info:
            await afork.Fork.new().run("os.no_such_function")
        assert info.value.stage == "run"
        with pytest.raises(afork.RemoteError, match="no_such_module"):
            await afork.Fork.new().run("no_such_module.f")
        # and the template has not suffered
        assert await read_all(await afork.Fork.new().eval(SHOW).run("show")) == b"()"

    arun(main)


def test_cancelling_the_await_kills_the_process(arun):
    async def main():
        f = afork.Fork.new().eval("import time; time.sleep(60)")
        task = asyncio.create_task(f.run("os.getpid"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await f.wait() == -9

    arun(main)


def test_not_awaited_runs_all_the_same(arun):
    async def main():
        r, w = os.pipe()
        afork.Fork.new().send_fh(w).eval(
            "def f(sock, out): out.write(b'done:' + sock.recv(9))"
        ).run("f")
        os.close(w)
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(r, "rb", 0)
        )
        assert await reader.read() == b"done:"
        transport.close()

    arun(main)
