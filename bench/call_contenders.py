"""Who makes calls, and in which scenario. The order is the order of a round."""

from __future__ import annotations

import sys

from contenders import Contender, app_command, limits_command

ONE = "one call at a time: an integer, and back; limit and ours on two processors"
TOGETHER = "the same, all processes on one processor"
MANY = "64 calls in flight, one worker"
BULK = "64 MiB as an argument; the worker reads a byte of each page"
SHARED = "an array born in a SharedBuffer; the worker writes into it"
COLD = "4 calls at once, numpy preloaded: until 4 processes are at work"
LOST = "a pool of one, the worker killed or its call cancelled"
QUEUE = "100,000 calls that wait for one worker"

INFLIGHT = 64

#: Key, label, function of call_peers; {} is how the processes are placed.
_CALLS = (
    ("rpc", "afork rpc", "{}_rpc"),
    ("rpc-uvloop", "afork rpc, uvloop", "{}_rpc_uvloop"),
    ("pool", "afork Pool", "{}_pool"),
    ("pool-uvloop", "afork Pool, uvloop", "{}_pool_uvloop"),
    ("ppe", "ProcessPoolExecutor", "blocking:ppe"),
    ("ppe-asyncio", "the same through run_in_executor", "ppe_asyncio"),
    ("mp-pool", "multiprocessing.Pool", "blocking:mp-pool"),
    ("loky", "loky", "blocking:loky"),
    ("pebble", "pebble", "blocking:pebble"),
    ("billiard", "billiard", "blocking:billiard"),
    ("execnet", "execnet", "blocking:execnet"),
    ("anyio", "anyio.to_process", "anyio"),
    ("trio", "trio-parallel", "trio"),
)

#: Keys of those that "ahead of every peer" means.
PEERS = tuple(key for key, _, _ in _CALLS if not key.startswith(("rpc", "pool")))

#: Scenario, group of the key; then the rest of the key, label, function.
_OTHERS: tuple[tuple[str, str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        BULK,
        "bulk-array",
        (
            ("pool", "afork Pool, array", "call_bulk.ours:array"),
            ("ppe", "ProcessPoolExecutor, array", "call_bulk.copied:array:ppe"),
            (
                "mp-pool",
                "multiprocessing.Pool, array",
                "call_bulk.copied:array:mp-pool",
            ),
            ("loky", "loky, array", "call_bulk.copied:array:loky"),
            ("pebble", "pebble, array", "call_bulk.copied:array:pebble"),
        ),
    ),
    (
        BULK,
        "bulk-bytes",
        (
            ("pool", "afork Pool, bytearray", "call_bulk.ours:bytearray"),
            ("ppe", "ProcessPoolExecutor, bytearray", "call_bulk.copied:bytearray:ppe"),
        ),
    ),
    (
        SHARED,
        "shared",
        (
            ("1", "afork Pool, 1 MiB", "call_bulk.shared:1"),
            ("256", "afork Pool, 256 MiB", "call_bulk.shared:256"),
        ),
    ),
    (
        COLD,
        "cold",
        (
            ("pool", "afork Pool", "call_cold.ours"),
            ("ppe", "ProcessPoolExecutor", "call_cold.blocking:ppe"),
            ("loky", "loky (no preload)", "call_cold.blocking:loky"),
            ("pebble", "pebble", "call_cold.blocking:pebble"),
        ),
    ),
    (
        LOST,
        "lost-kill",
        (
            ("pool", "afork Pool, killed", "call_lost.pool_lost:killed"),
            (
                "ppe",
                "ProcessPoolExecutor made anew, killed",
                "call_lost.executor_killed",
            ),
            ("loky", "loky reusable executor, killed", "call_lost.loky_killed"),
            ("pebble", "pebble, killed", "call_lost.pebble_lost:killed"),
        ),
    ),
    (
        LOST,
        "lost-cancel",
        (
            ("pool", "afork Pool, cancelled", "call_lost.pool_lost:cancelled"),
            ("pebble", "pebble, cancelled", "call_lost.pebble_lost:cancelled"),
            ("anyio", "anyio.to_process, cancelled", "call_lost.anyio_cancelled"),
            ("trio", "trio-parallel, cancelled", "call_lost.trio_cancelled"),
        ),
    ),
    (
        QUEUE,
        "queue",
        (
            ("bare", "bare futures", "call_queue.bare"),
            ("rpc", "afork rpc", "call_queue.rpc_rss"),
            ("rpc-traced", "afork rpc, tracemalloc", "call_queue.rpc_traced"),
            ("pool", "afork Pool", "call_queue.pool_rss"),
            ("pool-traced", "afork Pool, tracemalloc", "call_queue.pool_traced"),
            ("ppe", "ProcessPoolExecutor, 20,000", "call_queue.ppe_rss"),
            (
                "ppe-traced",
                "ProcessPoolExecutor, 20,000, tracemalloc",
                "call_queue.ppe_traced",
            ),
        ),
    ),
)


#: As a template does it: without an end of its own.
_NUMPY = "import numpy, os; os._exit(0)"


def contenders() -> list[Contender]:
    """All of them; a key is "scenario/who"."""
    listed = [
        Contender(
            f"{group}/limit",
            "C: socketpair, 64 bytes",
            scenario,
            limits_command("pingpong", cpus=cpus),
        )
        for group, scenario, cpus in (("one", ONE, 2), ("together", TOGETHER, 1))
    ]
    # Peers are placed by the kernel, so this is what is compared with them.
    for key, name in (("rpc", "rpc"), ("pool", "Pool")):
        command = app_command(f"call_peers.many_{key}")
        label = f"afork {name}, processors as the kernel likes"
        listed.append(Contender(f"one/{key}-free", label, ONE, command))
    for key, label, function in _CALLS:
        command = app_command(f"call_peers.{function.format('one')}")
        listed.append(Contender(f"one/{key}", label, ONE, command))
        if key not in PEERS:
            command = app_command(f"call_peers.{function.format('together')}")
            listed.append(Contender(f"together/{key}", label, TOGETHER, command))
    for key, label, function in (
        *_CALLS,
        ("rpc-window", "afork rpc, a window of futures", "rpc_window"),
    ):
        # A pool sends one worker at most `load` calls, and 1 by default.
        command = app_command(f"call_peers.{function.format('many')}", INFLIGHT)
        listed.append(Contender(f"many/{key}", label, MANY, command, INFLIGHT))
    listed.append(
        # No pool can be faster from nothing than its template imports numpy.
        Contender(
            "cold/limit",
            "C: posix_spawn python -c 'import numpy'",
            COLD,
            limits_command("spawn", program=[sys.executable, "-c", _NUMPY]),
        )
    )
    return listed + [
        Contender(f"{group}/{key}", label, scenario, app_command(function))
        for scenario, group, rows in _OTHERS
        for key, label, function in rows
    ]
