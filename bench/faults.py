"""From a fault to its error (scenario 3): ms until the await raises, ours only."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from meter import Goal, Sample
from peers import TARGET, load, run_async, version

HANG = 10.0  # seconds after which a fault counts as a hang
SETTLE = 0.02  # seconds for a request to reach the stopped template's socket

Fault = Callable[[Any], Awaitable[tuple[float, str]]]


async def _until_error(
    awaitable: Awaitable[Any], begin: float | None = None
) -> tuple[float, str]:
    """The ms from ``begin`` (or from now) to the error, and the error's name."""
    begin = time.perf_counter() if begin is None else begin
    try:
        async with asyncio.timeout(HANG):
            await awaitable
    except TimeoutError:
        raise RuntimeError(f"no error within {HANG:g} s") from None
    except Exception as error:  # every type counts: which one it was is in the results
        return (time.perf_counter() - begin) * 1e3, type(error).__name__
    raise RuntimeError("no error at all")


def _stop(pid: int) -> None:
    """Stop a process and wait until it stands, which may take it a moment."""
    os.kill(pid, signal.SIGSTOP)
    stat = Path(f"/proc/{pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.001)


async def _killed(
    template: Any, request: Callable[[], Awaitable[Any]]
) -> tuple[float, str]:
    """Stopped first, so that the request is surely outstanding when SIGKILL comes."""
    await template.ready()
    _stop(template.pid)
    waiting = asyncio.ensure_future(request())
    await asyncio.sleep(SETTLE)
    begin = time.perf_counter()
    os.kill(template.pid, signal.SIGKILL)
    return await _until_error(waiting, begin)


async def default_template_killed(afork: Any) -> tuple[float, str]:
    return await _killed(afork.Fork.default(), lambda: afork.Fork.new().run(TARGET))


async def own_template_killed(afork: Any) -> tuple[float, str]:
    template = afork.Fork.new().require("afork_bench_target")
    return await _killed(template, lambda: template.fork().run(TARGET))


async def next_start(afork: Any) -> tuple[float, str]:
    """No fault: the start after the default template's death, which makes a new one."""
    begin = time.perf_counter()
    async with asyncio.timeout(HANG):
        (await afork.Fork.new().run(TARGET)).close()
    return (time.perf_counter() - begin) * 1e3, "started"


async def unknown_function(afork: Any) -> tuple[float, str]:
    return await _until_error(
        afork.Fork.new().run("afork_bench_target.no_such_function")
    )


async def unknown_module(afork: Any) -> tuple[float, str]:
    return await _until_error(afork.Fork.new().run("afork_no_such_module.run"))


async def missing_program(afork: Any) -> tuple[float, str]:
    return await _until_error(afork.create_subprocess_exec("/nonexistent/afork-bench"))


async def missing_program_fork_exec(afork: Any) -> tuple[float, str]:
    return await _until_error(afork.Fork.new().exec("/nonexistent/afork-bench"))


FAULTS: dict[str, Fault] = {
    "default template killed": default_template_killed,
    "next start after it": next_start,
    "own template killed": own_template_killed,
    "unknown function": unknown_function,
    "unknown module": unknown_module,
    "missing program": missing_program,
    "missing program, Fork.exec": missing_program_fork_exec,
}


def faults(goal: Goal) -> Sample:
    """Every fault in turn, several times: none may spoil what comes after it."""
    afork = load("afork")
    repeat = 2 if goal.seconds < 0.4 else 4

    async def main() -> Sample:
        found: dict[str, dict[str, Any]] = {
            name: {"ms": [], "errors": []} for name in FAULTS
        }
        (await afork.Fork.new().run(TARGET)).close()
        begin = time.perf_counter()
        for _ in range(repeat):
            for name, fault in FAULTS.items():
                try:
                    ms, error = await fault(afork)
                    found[name]["ms"].append(ms)
                except (
                    Exception
                ) as failure:  # shown in the row: the other faults are still measured
                    error = f"FAILED: {type(failure).__name__}: {failure}"
                if error not in found[name]["errors"]:
                    found[name]["errors"].append(error)
        seconds = time.perf_counter() - begin
        n = sum(len(one["ms"]) for one in found.values())
        return {
            "n": n,
            "seconds": seconds,
            "faults": found,
            "versions": {"afork": version(afork)},
        }

    return run_async(main)
