"""Workers of the peers that live until this process is told to end, for living.py.

``python -c "import living_peers; living_peers.main()" WAY MODULES N`` imports the
modules, starts N workers, prints their process ids when all are at work, and ends with
its standard input.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import afork_bench_target as target
from peers import load

#: Starts so many workers that hold() in this folder; gives what ends them afterwards.
Start = Callable[[str, int], Callable[[], object]]


def os_fork(folder: str, n: int) -> Callable[[], object]:
    pids = []
    for _ in range(n):
        pids.append(pid := os.fork())
        if pid == 0:
            if sys.argv[2]:
                gc.collect()
            target.hold(folder)

    def end() -> None:  # they have the other end of what they wait at, too
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    return end


def _forkserver(package: str, *modules: str) -> Any:
    context = load(package).get_context("forkserver")
    context.set_forkserver_preload([target.__name__, *modules])
    return context


def processes(package: str) -> Start:
    def start(folder: str, n: int) -> Callable[[], object]:
        context = _forkserver(package)
        every = [context.Process(target=target.hold, args=(folder,)) for _ in range(n)]
        for process in every:
            process.start()
        return lambda: [process.join() for process in every]

    return start


def pebble(folder: str, n: int) -> Callable[[], object]:
    pool = load("pebble").ProcessPool(
        n, context=_forkserver("multiprocessing", "pebble")
    )
    for _ in range(n):
        pool.schedule(target.hold, args=(folder,))

    def end() -> None:
        pool.close()
        pool.join()

    return end


def loky(folder: str, n: int) -> Callable[[], object]:
    pool = load("loky").ProcessPoolExecutor(n)
    for _ in range(n):
        pool.submit(target.hold, folder)
    return lambda: pool.shutdown(kill_workers=True)


WAYS: dict[str, Start] = {
    "os-fork": os_fork,
    "forkserver": processes("multiprocessing"),
    "billiard": processes("billiard"),
    "pebble": pebble,
    "loky": loky,
}


def main() -> None:
    way, modules, n = WAYS[sys.argv[1]], sys.argv[2], int(sys.argv[3])
    for name in modules.split(",") if modules else []:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="afork-bench-") as folder:
        fds = []
        for name in ("wait", "tell"):
            os.mkfifo(f"{folder}/{name}")
            fds.append(os.open(f"{folder}/{name}", os.O_RDWR))
        wait, tell = fds
        end = way(folder, n)
        for _ in range(n):
            print(int(os.read(tell, 8)))
        print(flush=True)
        sys.stdin.read()
        os.close(wait)
        end()
