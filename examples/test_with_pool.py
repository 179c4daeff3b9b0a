"""A pytest fixture: one template for all tests, clean processes for each.

Run it with ``pytest test_with_pool.py``. The template loads what the tests need,
once; each test has a pool of its own, and none of its processes is left.
"""

import asyncio
import os
from collections.abc import Iterator

import pytest

import afork


@pytest.fixture(scope="session")
def template() -> Iterator[afork.Fork]:
    """A process that has loaded what is slow to load."""
    fork = afork.Fork.new().require("decimal", "fractions")
    yield fork
    fork.close()


@pytest.fixture
def run_in_processes(template):
    """Run an async function with a pool as its argument."""

    def run(test):
        async def main():
            async with asyncio.timeout(10), afork.Pool(template=template) as pool:
                return await test(pool)

        return asyncio.run(main())

    return run


def test_each_call_has_its_own_environment(run_in_processes):
    async def test(pool):
        await pool.call(os.putenv, "NAME", "value")
        return await pool.call(os.getpid)

    assert run_in_processes(test) != os.getpid()
    assert "NAME" not in os.environ


def test_a_crash_is_an_exception(run_in_processes):
    async def test(pool):
        with pytest.raises(afork.WorkerLost):
            await pool.call(os.abort)
        return await pool.call(len, "and the next call works")

    assert run_in_processes(test) == 23
