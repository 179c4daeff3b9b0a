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

_CALLS = (
    ("rpc", "afork rpc", "one_rpc"),
    ("rpc-uvloop", "afork rpc, uvloop", "one_rpc_uvloop"),
    ("pool", "afork Pool", "one_pool"),
    ("pool-uvloop", "afork Pool, uvloop", "one_pool_uvloop"),
    ("ppe", "ProcessPoolExecutor", "peer_ppe"),
    ("ppe-asyncio", "the same through run_in_executor", "ppe_asyncio"),
    ("mp-pool", "multiprocessing.Pool", "peer_mp_pool"),
    ("loky", "loky", "peer_loky"),
    ("pebble", "pebble", "peer_pebble"),
    ("billiard", "billiard", "peer_billiard"),
    ("execnet", "execnet", "peer_execnet"),
    ("anyio", "anyio.to_process", "anyio"),
    ("trio", "trio-parallel", "trio"),
)

#: Keys of those that "ahead of every peer" means.
PEERS = tuple(key for key, _, _ in _CALLS if not key.startswith(("rpc", "pool")))

_OTHERS = (
    ("bulk-array", BULK, "pool", "afork Pool, array", "bulk_array_pool"),
    ("bulk-array", BULK, "ppe", "ProcessPoolExecutor, array", "bulk_array_ppe"),
    (
        "bulk-array",
        BULK,
        "mp-pool",
        "multiprocessing.Pool, array",
        "bulk_array_mp_pool",
    ),
    ("bulk-array", BULK, "loky", "loky, array", "bulk_array_loky"),
    ("bulk-array", BULK, "pebble", "pebble, array", "bulk_array_pebble"),
    ("bulk-bytes", BULK, "pool", "afork Pool, bytearray", "bulk_bytes_pool"),
    ("bulk-bytes", BULK, "ppe", "ProcessPoolExecutor, bytearray", "bulk_bytes_ppe"),
    ("shared", SHARED, "1", "afork Pool, 1 MiB", "shared_1"),
    ("shared", SHARED, "256", "afork Pool, 256 MiB", "shared_256"),
    ("cold", COLD, "pool", "afork Pool", "cold_pool"),
    ("cold", COLD, "ppe", "ProcessPoolExecutor", "cold_ppe"),
    ("cold", COLD, "loky", "loky (no preload)", "cold_loky"),
    ("cold", COLD, "pebble", "pebble", "cold_pebble"),
    ("lost-kill", LOST, "pool", "afork Pool, killed", "lost_pool_kill"),
    (
        "lost-kill",
        LOST,
        "ppe",
        "ProcessPoolExecutor made anew, killed",
        "lost_ppe_kill",
    ),
    ("lost-kill", LOST, "loky", "loky reusable executor, killed", "lost_loky_kill"),
    ("lost-kill", LOST, "pebble", "pebble, killed", "lost_pebble_kill"),
    ("lost-cancel", LOST, "pool", "afork Pool, cancelled", "lost_pool_cancel"),
    ("lost-cancel", LOST, "pebble", "pebble, cancelled", "lost_pebble_cancel"),
    ("lost-cancel", LOST, "anyio", "anyio.to_process, cancelled", "lost_anyio_cancel"),
    ("lost-cancel", LOST, "trio", "trio-parallel, cancelled", "lost_trio_cancel"),
)

_QUEUES = (
    ("bare", "bare futures", "bare"),
    ("rpc", "afork rpc", "rpc_rss"),
    ("rpc-traced", "afork rpc, tracemalloc", "rpc_traced"),
    ("pool", "afork Pool", "pool_rss"),
    ("pool-traced", "afork Pool, tracemalloc", "pool_traced"),
    ("ppe", "ProcessPoolExecutor, 20,000", "ppe_rss"),
    ("ppe-traced", "ProcessPoolExecutor, 20,000, tracemalloc", "ppe_traced"),
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
        command = app_command(f"call_peers.{function}")
        listed.append(Contender(f"one/{key}", label, ONE, command))
        if key not in PEERS:
            name = function.replace("one_", "together_")
            command = app_command(f"call_peers.{name}")
            listed.append(Contender(f"together/{key}", label, TOGETHER, command))
    for key, label, function in (
        *_CALLS,
        ("rpc-window", "afork rpc, a window of futures", "rpc_window"),
    ):
        # A pool sends one worker at most `load` calls, and 1 by default.
        name = function.replace("one_", "many_")
        command = app_command(f"call_peers.{name}", INFLIGHT)
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
    for group, scenario, key, label, function in _OTHERS:
        command = app_command(f"call_peers.{function}")
        listed.append(Contender(f"{group}/{key}", label, scenario, command))
    for key, label, function in _QUEUES:
        command = app_command(f"call_queue.{function}")
        listed.append(Contender(f"queue/{key}", label, QUEUE, command))
    return listed
