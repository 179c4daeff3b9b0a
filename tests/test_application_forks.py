"""The application itself forks: what its child has of RPC and pools."""

from __future__ import annotations

import importlib.util

import pytest

from .conftest import need

#: A fork with threads is a warning, whoever started them.
BEGIN = """
import asyncio, importlib, os, sys, warnings
import afork
warnings.simplefilter("ignore", DeprecationWarning)
factory = importlib.import_module(sys.argv[1]).new_event_loop

def run(main):
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(asyncio.wait_for(main(), 10))
"""

DESCRIPTORS = """
def open_descriptors():
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the one that listed them
            continue
        found.add(int(name))
    return found

async def main():
    async with afork.Pool(max=1) as pool:  # what is imported late has been
        await pool.call(abs, 1)
    r, w = os.pipe()
    before = open_descriptors()
    async with afork.Pool(max=2, stdout=w, logging=True) as pool:
        captured = await pool.with_options(capture=True).call(abs, -6)
        assert captured == (6, b"", b"", False)
        assert await pool.call(abs, -7) == 7
        assert open_descriptors() > before
        pid = os.fork()
        if not pid:
            os._exit(len(open_descriptors() - before))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert await pool.call(abs, -8) == 8
        assert await pool.call(os.write, 1, b"its parent's") == 12
    assert os.read(r, 100) == b"its parent's"

run(main)
"""

OUTPUT = """
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
        assert await pool.call(os.write, 1, b"late\\n") == 5
        pid = os.fork()
        if not pid:
            os._exit(0)
        os.waitpid(pid, 0)
        os.close(w)
        while full:
            full -= len(os.read(r, full))
        assert await pool.call(abs, -1) == 1
    late = b""
    while data := await asyncio.to_thread(os.read, r, 100):
        late += data
    assert late == b"late\\n", late

run(main)
"""


@pytest.fixture(params=["asyncio", "uvloop"])
def package(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "uvloop":
        need(name, importlib.util.find_spec(name) is not None, "no uvloop here")
    return name


def test_a_child_has_no_descriptor_of_a_pool(run_script, package):
    """Nor what stands between it and its loop, or where output leads."""
    run_script(BEGIN + DESCRIPTORS, package)


def test_output_that_waits_is_written_once(run_script, package):
    """By the application, and not by its child as well."""
    run_script(BEGIN + OUTPUT, package)
