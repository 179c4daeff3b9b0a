"""What the tests of pools share: gates that calls wait at, events to wait for."""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module pool_jobs, under a name that processes find it by as well."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("pool_jobs")


class Gate:
    """A FIFO that calls wait at until they are let go."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = str(path)
        # Both ways: so neither side waits for the other to open it.
        self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def open(self, n: int = 1) -> None:
        os.write(self.fd, b"x" * n)

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """Calls of pool_jobs.hold(gate.path) wait for gate.open()."""
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.close()


class Seen:
    """A callback that remembers, and can be waited for."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self._changed = asyncio.Event()

    def __call__(self, what: Any = None) -> None:
        self.all.append(what)
        self._changed.set()

    async def until(self, condition: Callable[[list[Any]], bool]) -> list[Any]:
        """Wait until what was seen is what is waited for."""
        while not condition(self.all):
            self._changed.clear()
            await self._changed.wait()
        return self.all

    async def first(self, n: int) -> list[Any]:
        return (await self.until(lambda all: len(all) >= n))[:n]

    def args(self) -> list[tuple[Any, ...]]:
        """Of events."""
        return [event.args for event in self.all]

    async def held(self, n: int) -> list[int]:
        """Wait for n calls to be at their gates; the processes they are in."""
        await self.until(lambda all: self._held() >= n)
        return [x.args[1] for x in self.all if x.args[0] == "held"]

    def _held(self) -> int:
        return sum(1 for x in self.all if x.args[0] == "held")


async def turn(n: int = 1) -> None:
    """Let the loop go round."""
    for _ in range(n):
        await asyncio.sleep(0)


async def gone(pids: list[int]) -> None:
    """Wait for processes to end."""
    loop = asyncio.get_running_loop()
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ended = loop.create_future()
        loop.add_reader(fd, lambda ended=ended: ended.done() or ended.set_result(None))
        try:
            await ended
        finally:
            loop.remove_reader(fd)
            os.close(fd)


def check(pool: Any) -> None:
    """What is always true of a pool."""
    core = pool._core
    stats = pool.stats()
    workers = [*core.workers, *core.leaving]
    assert not core.workers & core.leaving
    assert stats.running == sum(len(w.calls) for w in workers), stats
    assert stats.waiting == sum(not x[2].done() for x in core._heap), stats
    assert len(core.workers) <= core.settings.max
    assert stats.starting == sum(not w.ready for w in core.workers)
    assert stats.idle >= 0
    for load, room in enumerate(core._rooms._by_calls):
        assert all(len(w.calls) == load and w in core.workers for w in room)
    # Nothing waits while there is room, once the loop has gone round.
    assert not (core.waiting and core._rooms.least() and not core._growing), stats
