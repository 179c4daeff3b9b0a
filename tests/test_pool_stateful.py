"""Pool against a simple model, driven by Hypothesis."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

import afork

from .conftest import HANG, open_descriptors
from .scripts.fault_tools import log  # noqa: F401 - a fixture
from .scripts.pool_tools import Gate, check, turn

KINDS = ("add", "hold", "fail", "crash", "exit", "stream")


class Asked:
    """A call, and what may become of it."""

    def __init__(self, kind: str, number: int, retries: int, call: Any) -> None:
        self.kind = kind
        self.number = number
        self.retries = retries
        self.call = call
        self.cancelled = False


class PoolMachine(RuleBasedStateMachine):
    """Calls, cancels, kills; every call is answered once, none runs too often."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.gate = Gate(self.folder / "gate")
        self.log = self.folder / "log"
        self.log.touch()
        self.loop = asyncio.new_event_loop()
        self.complaints: list[Any] = []
        self.loop.set_exception_handler(lambda loop, what: self.complaints.append(what))
        self.asked: list[Asked] = []
        self.holds = self.opened = self.kills = 0
        self.closed = False

    def run(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, HANG))

    @initialize(
        load=st.integers(1, 3),
        most=st.integers(1, 3),
        max_calls=st.sampled_from([None, 1, 4]),
        stop=st.sampled_from([0.001, 10]),
    )
    def start(self, load: int, most: int, max_calls: int | None, stop: float) -> None:
        gc.collect()  # what the example before has left is not of this one

        async def main() -> None:
            self.pool = afork.Pool(load=load, max=most, max_calls=max_calls, stop=stop)
            self.pool.template.require("pool_jobs")
            await self.pool.call(os.getpid)
            await turn(20)

        self.run(main())

    # -- what users do

    @precondition(lambda self: not self.closed)
    @rule(
        kind=st.sampled_from(KINDS),
        priority=st.integers(-1, 1),
        retries=st.sampled_from([0, 0, 2]),
        times=st.integers(1, 5),
    )
    def call(self, kind: str, priority: int, retries: int, times: int) -> None:
        import pool_jobs

        async def main() -> None:
            for _ in range(times):
                number = len(self.asked)
                if kind == "stream":
                    stream = self.pool.stream(pool_jobs.noted, self.log, number, kind)
                    call = asyncio.ensure_future(_read(stream))
                    call.add_done_callback(_forget)
                    await turn()
                    self.asked.append(Asked(kind, number, 0, call))
                    continue
                view = self.pool.with_options(priority=priority, retries=retries)
                call = view.call(
                    pool_jobs.noted, self.log, number, kind, self.gate.path
                )
                self.asked.append(Asked(kind, number, retries, call))
                self.holds += kind == "hold"

        self.run(main())

    @rule(which=st.integers(0, 9))
    def cancel(self, which: int) -> None:
        open_calls = [x for x in self.asked if not x.call.done()]
        if open_calls:

            async def main() -> None:
                x = open_calls[which % len(open_calls)]
                x.cancelled = x.call.cancel()

            self.run(main())

    @rule(n=st.integers(1, 3))
    def open_gate(self, n: int) -> None:
        self.gate.open(n)
        self.opened += n

    @rule(turns=st.integers(1, 60))
    def wait(self, turns: int) -> None:
        self.run(turn(turns))

    def _ready(self, which: int) -> Any:
        workers = sorted(self.pool._core.workers, key=lambda w: w.began)
        ready = [w for w in workers if w.ready]
        return ready[which % len(ready)] if ready else None

    @rule(which=st.integers(0, 5), number=st.sampled_from([9, 15]))
    def kill(self, which: int, number: int) -> None:
        worker = self._ready(which)
        if worker is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.fork.pid, number)
                self.kills += 1

    @rule(which=st.integers(0, 5))
    def retire(self, which: int) -> None:
        async def main() -> None:
            worker = self._ready(which)
            if worker is not None:
                self.pool._core.retire(worker)

        self.run(main())

    @precondition(lambda self: not self.closed)
    @rule(idle=st.integers(0, 3))
    def resize(self, idle: int) -> None:
        core = self.pool._core
        core.settings.idle = min(idle, core.settings.max)

        async def main() -> None:
            core._grow_soon()
            await turn(3)

        self.run(main())

    @rule()
    def drain(self) -> None:
        n = max(0, self.holds * 3 - self.opened)
        if n:
            self.open_gate(n)
        self.run(self.pool.drain())
        assert all(x.call.done() for x in self.asked if x.kind != "stream")
        # What is open here is a function of the processes.
        fds, n = self.run(self._settle())
        if not self.closed:
            base = fds - 3 * n - bool(n)  # and one for all: where stderr goes
            assert base == getattr(self, "base", base), (fds, self.pool.stats())
            self.base = base

    async def _settle(self) -> tuple[int, int]:
        core = self.pool._core
        while core.starting or core.leaving or core._growing:
            await asyncio.sleep(0)
        return len(open_descriptors()), len(core.workers)

    @precondition(lambda self: not self.closed and len(self.asked) > 5)
    @rule(timeout=st.sampled_from([0, None]))
    def close(self, timeout: float | None) -> None:
        if timeout is None:
            self.open_gate(self.holds * 3 + 1)
        self.run(self.pool.close(timeout))
        self.closed = True
        assert not self.pool.stats().pids
        for x in self.asked:
            x.cancelled = x.cancelled or timeout == 0

    # -- what is always true

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "pool"):
            check(self.pool)
        assert not self.complaints, self.complaints

    def teardown(self) -> None:
        try:
            if hasattr(self, "pool"):
                self.drain()
                self.run(self.pool.close())
                self.run(turn(3))
                self.compare()
        finally:
            self.gate.close()
            self.loop.close()
            shutil.rmtree(self.folder)
        assert not self.complaints, self.complaints

    def compare(self) -> None:
        ran = [int(x) for x in self.log.read_text().split()]
        died = 0
        for x in self.asked:
            assert x.call.done()
            times = ran.count(x.number)
            assert times <= 1 + x.retries, (x.kind, times)
            if x.call.cancelled():
                assert x.cancelled
                continue
            error = x.call.exception()
            if isinstance(error, afork.WorkerLost):
                died += 1 + x.retries
            elif x.kind == "fail":
                assert isinstance(error, ValueError)
                assert times >= 1
            elif isinstance(error, afork.ClosedError):
                assert x.kind == "stream"
                assert x.cancelled  # cut off by close
            elif x.kind == "stream":
                assert error is None
                assert x.call.result() == [x.number, 1, 2]
            else:
                assert error is None, error
                assert x.kind in ("add", "hold"), x.kind
                assert x.call.result() == x.number
                assert times >= 1
        crashes = sum(ran.count(x.number) for x in self.asked if x.kind in CRASHES)
        assert died <= self.kills + crashes
        counts = self.pool.stats().counts
        assert counts.done + counts.failed + counts.cancelled == len(self.asked) + 1


CRASHES = ("crash", "exit")


def _forget(call: asyncio.Future[Any]) -> None:
    if not call.cancelled():
        call.exception()


async def _read(stream: Any) -> list[Any]:
    async with stream:
        return [x async for x in stream]


@pytest.fixture
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "scripts"))


@pytest.mark.usefixtures("_path")
def test_pool_and_its_model(log):  # noqa: F811
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        PoolMachine,
        settings=settings(
            max_examples=40,
            stateful_step_count=25,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # to shrink takes longer than a test may
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
    log.lines.clear()
    assert "pool_jobs" in sys.modules
