"""The application itself forks: what its child has of RPC and pools."""

from __future__ import annotations

import os

import afork

from .conftest import open_descriptors
from .scripts.api_ask import read_pipe


def test_a_child_has_no_descriptor_of_a_pool(arun):
    """Nor what stands between it and its loop, or where output leads."""

    async def main():
        async with afork.Pool(max=1) as pool:  # what is imported late has been
            await pool.call(abs, 1)
        r, w = os.pipe()
        before = set(open_descriptors())
        async with afork.Pool(max=2, stdout=w, logging=True) as pool:
            assert await pool.call(abs, -7) == 7
            assert set(open_descriptors()) > before
            pid = os.fork()
            if not pid:
                left = set(open_descriptors()) - before
                os._exit(len(left))
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert await pool.call(abs, -8) == 8
            assert await pool.call(os.write, 1, b"its parent's") == 12
        assert os.read(r, 100) == b"its parent's"
        os.close(r)
        os.close(w)

    arun(main)


def test_output_that_waits_is_written_once(arun):
    """By the application, and not by its child as well."""

    async def main():
        r, w = os.pipe()
        os.set_blocking(w, False)
        full = 0
        try:
            while True:
                full += os.write(w, b"x" * 4096)
        except BlockingIOError:
            os.set_blocking(w, True)
        async with afork.Pool(max=1, stdout=w) as pool:
            assert await pool.call(os.write, 1, b"late\n") == 5
            pid = os.fork()
            if not pid:
                os._exit(0)
            os.waitpid(pid, 0)
            os.close(w)
            while full:
                full -= len(os.read(r, full))
            assert await pool.call(abs, -1) == 1
        assert await read_pipe(r) == b"late\n"

    arun(main)
