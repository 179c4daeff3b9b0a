"""Calls into worker processes: ours and those of the peers.

Every function runs in a fresh application process (app.py) and returns that round's
sample. The peers that block are used the way they are fastest, from plain code and not
through an event loop.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import afork_bench_target as target
from meter import Goal, Meter, Sample, measure
from peers import load, run_async, version

#: Calls fn(*args) and gives a function that waits for its result.
Submit = Callable[..., Callable[[], Any]]
Call = Callable[..., Awaitable[Any]]

PRELOADED = ["numpy", target.__name__]


def forkserver() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED[1:])
    return context


# -- the peers: one worker each


@contextmanager
def executor() -> Iterator[Submit]:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1, mp_context=forkserver()) as pool:
        yield lambda *call: pool.submit(*call).result


@contextmanager
def mp_pool() -> Iterator[Submit]:
    with forkserver().Pool(1) as pool:
        yield lambda fn, *args: pool.apply_async(fn, args).get


@contextmanager
def loky() -> Iterator[Submit]:
    pool = load("loky").ProcessPoolExecutor(1)
    yield lambda *call: pool.submit(*call).result
    pool.shutdown(kill_workers=True)


@contextmanager
def pebble() -> Iterator[Submit]:
    with load("pebble").ProcessPool(1, context=forkserver()) as pool:
        yield lambda fn, *args: pool.schedule(fn, args=args).result
        pool.stop()


@contextmanager
def billiard() -> Iterator[Submit]:
    load("billiard")
    import billiard

    context = billiard.get_context("forkserver")
    pool = context.Pool(1)
    yield lambda fn, *args: pool.apply_async(fn, args).get
    pool.terminate()
    pool.join()


_EXECNET = """
from importlib import import_module
function = getattr(import_module({module!r}), {name!r})
for args in channel:
    channel.send(function(*args))
"""


@contextmanager
def execnet() -> Iterator[Submit]:
    """One function, and answers in order: so its channels are meant."""
    group = load("execnet").Group()
    source = _EXECNET.format(module=target.__name__, name="echo")
    channel = group.makegateway("popen").remote_exec(source)

    def submit(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        assert fn is target.echo
        channel.send(args)
        return channel.receive  # type: ignore[no-any-return]

    yield submit
    channel.close()
    group.terminate(1.0)


BLOCKING = {
    "ppe": (executor, "concurrent.futures"),
    "mp-pool": (mp_pool, "multiprocessing"),
    "loky": (loky, "loky"),
    "pebble": (pebble, "pebble"),
    "billiard": (billiard, "billiard"),
    "execnet": (execnet, "execnet"),
}


def blocking(name: str, goal: Goal) -> Sample:
    """A window of ``inflight`` calls: whoever waits for the oldest makes the next."""
    peer, package = BLOCKING[name]
    with peer() as submit:
        for warm in (goal.brief(), goal):
            open_calls: deque[Callable[[], Any]] = deque()
            meter = Meter(warm)
            while True:
                while len(open_calls) < goal.inflight and meter.more():
                    open_calls.append(submit(target.echo, meter.started))
                if not open_calls:
                    break
                open_calls.popleft()()
            sample = meter.stop()
    return {**sample, "versions": versions(package)}


def versions(package: str) -> dict[str, str]:
    from importlib import metadata

    try:
        return {package: metadata.version(package)}
    except metadata.PackageNotFoundError:  # the standard library's
        return {}


# -- ours, and the peers of event loops


@asynccontextmanager
async def rpc() -> AsyncIterator[Call]:
    afork = load("afork")
    template = afork.Fork.new().require(target.__name__)
    async with template.fork().rpc("afork_bench_target.echo") as rpc:
        yield lambda fn, *args: rpc(*args)


def pool(load_: int = 1) -> Callable[[], AbstractAsyncContextManager[Call]]:
    @asynccontextmanager
    async def made() -> AsyncIterator[Call]:
        async with load("afork").Pool(max=1, load=load_) as pool:
            pool.template.require(target.__name__)
            yield pool.call

    return made


@asynccontextmanager
async def executor_in_loop() -> AsyncIterator[Call]:
    from concurrent.futures import ProcessPoolExecutor

    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(1, mp_context=forkserver()) as pool:
        yield lambda *call: loop.run_in_executor(pool, *call)


@asynccontextmanager
async def anyio_process() -> AsyncIterator[Call]:
    load("anyio")
    from anyio import CapacityLimiter, to_process

    limiter = CapacityLimiter(1)
    yield lambda fn, *args: to_process.run_sync(fn, *args, limiter=limiter)


def descendants() -> list[int]:
    """All processes that this one has started, and they."""
    found, new = [], {os.getpid()}
    while new:
        found += new
        parents, new = new, set()
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended
                continue
            if parent in parents:
                new.add(int(stat.parent.name))
    return found[1:]


def place(cpus: int) -> None:
    """Keep our processes on one processor, or us on one and them on another.

    Left to itself the kernel does either, now this and then that. To wake another
    processor that sleeps takes longer than all the rest.
    """
    usable = sorted(os.sched_getaffinity(0))
    for pid in descendants():
        os.sched_setaffinity(pid, {usable[0] if cpus == 2 else usable[-1]})
    os.sched_setaffinity(0, {usable[-1]})


async def calls(
    made: Callable[[], AbstractAsyncContextManager[Call]], goal: Goal, cpus: int
) -> Sample:
    """As many tasks as calls may be in flight, each with one at a time."""
    async with made() as call:
        if cpus:
            await call(target.echo, 0)
            place(cpus)
        return await measure(lambda: call(target.echo, 1), goal)


def looped(
    made: Callable[[], AbstractAsyncContextManager[Call]],
    package: str,
    loop_package: str | None = None,
    cpus: int = 0,
) -> Callable[[Goal], Sample]:
    def contender(goal: Goal) -> Sample:
        sample = run_async(lambda: calls(made, goal, cpus), loop_package)
        return {**sample, "versions": versions(package)}

    return contender


one_rpc = looped(rpc, "afork", cpus=2)
one_rpc_uvloop = looped(rpc, "afork", "uvloop", cpus=2)
one_pool = looped(pool(), "afork", cpus=2)
one_pool_uvloop = looped(pool(), "afork", "uvloop", cpus=2)
together_rpc = looped(rpc, "afork", cpus=1)
together_rpc_uvloop = looped(rpc, "afork", "uvloop", cpus=1)
together_pool = looped(pool(), "afork", cpus=1)
together_pool_uvloop = looped(pool(), "afork", "uvloop", cpus=1)
many_rpc = looped(rpc, "afork")
many_rpc_uvloop = looped(rpc, "afork", "uvloop")
many_pool = looped(pool(64), "afork")
many_pool_uvloop = looped(pool(64), "afork", "uvloop")
ppe_asyncio = looped(executor_in_loop, "concurrent.futures")
anyio = looped(anyio_process, "anyio")


def trio(goal: Goal) -> Sample:
    """trio-parallel, one worker."""
    load("trio_parallel")
    import trio as trio_
    import trio_parallel

    async def lane(meter: Meter, limiter: Any) -> None:
        while meter.more():
            await trio_parallel.run_sync(target.echo, 1, limiter=limiter)

    async def main() -> Sample:
        limiter = trio_.CapacityLimiter(1)
        for warm in (goal.brief(), goal):
            meter = Meter(warm)
            async with trio_.open_nursery() as nursery:
                for _ in range(goal.inflight):
                    nursery.start_soon(lane, meter, limiter)
            sample = meter.stop()
        return sample

    return {**trio_.run(main), "versions": versions("trio-parallel")}


def rpc_window(goal: Goal) -> Sample:
    """Without a task per call: the futures themselves, as the blocking peers do it."""

    async def main() -> Sample:
        async with rpc() as call:
            open_calls: deque[Awaitable[Any]] = deque()
            for warm in (goal.brief(), goal):
                meter = Meter(warm)
                while True:
                    while len(open_calls) < goal.inflight and meter.more():
                        open_calls.append(call(target.echo, 1))
                    if not open_calls:
                        break
                    await open_calls.popleft()
                sample = meter.stop()
            return sample

    return run_async(main)


def _add_blocking() -> None:
    for name in BLOCKING:
        globals()[f"peer_{name.replace('-', '_')}"] = lambda goal, name=name: blocking(
            name, goal
        )


_add_blocking()


# -- large arguments

MIB = 1 << 20


def _large(kind: str, mib: int) -> Any:
    if kind == "bytearray":
        return bytearray(b"\1") * (mib * MIB)
    return load("numpy").ones(mib * MIB // 8)


def bulk_blocking(kind: str, goal: Goal, name: str = "ppe") -> Sample:
    argument = _large(kind, 64)
    peer, package = BLOCKING[name]
    with peer() as submit:
        for warm in (goal.brief(), goal):
            meter = Meter(warm)
            while meter.more():
                assert submit(target.touch, argument)() == 64 * MIB // target.PAGE
            sample = meter.stop()
    return {**sample, "versions": versions(package)}


def bulk_ours(kind: str, goal: Goal) -> Sample:
    argument = _large(kind, 64)

    async def main() -> Sample:
        async with load("afork").Pool(max=1) as pool:

            async def start() -> None:
                found = await pool.call(target.touch, argument)
                assert found == 64 * MIB // target.PAGE

            return await measure(start, goal)

    return run_async(main)


def bulk_array_ppe(goal: Goal) -> Sample:
    return bulk_blocking("array", goal)


def bulk_bytes_ppe(goal: Goal) -> Sample:
    return bulk_blocking("bytearray", goal)


def bulk_array_loky(goal: Goal) -> Sample:
    return bulk_blocking("array", goal, "loky")


def bulk_array_mp_pool(goal: Goal) -> Sample:
    return bulk_blocking("array", goal, "mp-pool")


def bulk_array_pebble(goal: Goal) -> Sample:
    return bulk_blocking("array", goal, "pebble")


def bulk_array_pool(goal: Goal) -> Sample:
    return bulk_ours("array", goal)


def bulk_bytes_pool(goal: Goal) -> Sample:
    return bulk_ours("bytearray", goal)


def _shared(mib: int, goal: Goal) -> Sample:
    """An array that was born in a SharedBuffer; the worker writes into it."""
    afork, numpy = load("afork"), load("numpy")

    async def main() -> Sample:
        array = numpy.frombuffer(afork.SharedBuffer(mib * MIB), dtype=numpy.uint8)
        array[:] = 7
        async with afork.Pool(max=1) as pool:

            async def start() -> None:
                array[0] = 7
                assert await pool.call(target.ends, array) == 7
                assert array[0] == 1

            return await measure(start, goal)

    return run_async(main)


def shared_1(goal: Goal) -> Sample:
    return _shared(1, goal)


def shared_256(goal: Goal) -> Sample:
    return _shared(256, goal)


# -- meeting workers


class Meeting:
    """Where `afork_bench_target.meet` goes to."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="afork-bench-")
        self.address = str(Path(self._folder.name, "meeting"))
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.bind(self.address)
        self.sock.listen(64)

    def wait(self, n: int) -> tuple[float, list[int], list[socket.socket]]:
        """When all of n processes are there, their ids, and the word to let them go."""
        there = [self.sock.accept()[0] for _ in range(n)]
        pids = [int.from_bytes(sock.recv(8), "little") for sock in there]
        return time.perf_counter(), pids, there

    def close(self) -> None:
        self.sock.close()
        self._folder.cleanup()


N = 4


class _Watch:
    """Waits in a thread: the application has something else to do."""

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting
        self.at = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.at, pids, there = self._meeting.wait(N)
        for sock in there:
            sock.close()
        if len(set(pids)) != N:
            raise RuntimeError(f"not {N} processes: {pids}")

    def join(self) -> float:
        self._thread.join(30)
        return self.at


def _blocking_pool(name: str, context: Any) -> Any:
    if name == "ppe":
        from concurrent.futures import ProcessPoolExecutor

        return ProcessPoolExecutor(N, mp_context=context)
    if name == "loky":
        return load("loky").ProcessPoolExecutor(N)
    return load("pebble").ProcessPool(N, context=context)


def _cold_blocking(name: str, goal: Goal) -> Sample:
    """From nothing, then again with the forkserver up."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    meeting = Meeting()

    def once() -> float:
        watch = _Watch(meeting)
        begin = time.perf_counter()
        pool = _blocking_pool(name, context)
        submit = pool.submit if name != "pebble" else _schedule(pool)
        open_calls = [submit(target.meet, meeting.address) for _ in range(N)]
        seconds = watch.join() - begin
        for call in open_calls:
            call.result(30)
        if name == "pebble":
            pool.close()
            pool.join()
        else:
            pool.shutdown()
        return seconds

    first = once()
    again = [once() for _ in range(3)]
    meeting.close()
    return {"n": 1, "seconds": first, "warm_ms": [x * 1e3 for x in again]}


def _schedule(pool: Any) -> Any:
    return lambda fn, *args: pool.schedule(fn, args=args)


def cold_ppe(goal: Goal) -> Sample:
    return _cold_blocking("ppe", goal)


def cold_loky(goal: Goal) -> Sample:
    return _cold_blocking("loky", goal)


def cold_pebble(goal: Goal) -> Sample:
    return _cold_blocking("pebble", goal)


def cold_pool(goal: Goal) -> Sample:
    """From nothing, then again with a template that is up."""
    afork = load("afork")
    meeting = Meeting()

    async def once(pool: Any) -> float:
        watch = _Watch(meeting)
        begin = time.perf_counter()
        async with pool() as made:
            made.template.require(*PRELOADED)
            open_calls = [made.call(target.meet, meeting.address) for _ in range(N)]
            await asyncio.gather(*open_calls)
        return watch.join() - begin

    async def main() -> Sample:
        first = await once(lambda: afork.Pool(max=N))
        template = afork.Fork.new().require(*PRELOADED)
        await template.ready()
        again = [
            await once(lambda: afork.Pool(max=N, template=template)) for _ in range(3)
        ]
        return {"n": 1, "seconds": first, "warm_ms": [x * 1e3 for x in again]}

    sample = run_async(main)
    meeting.close()
    return {**sample, "versions": {"afork": version(afork)}}


# -- a worker that is lost


class Losses:
    """Milliseconds until the caller knows, and until the next call has its answer."""

    def __init__(self, goal: Goal) -> None:
        self.until = time.perf_counter() + max(goal.seconds, 0.2) * 2
        self.most = goal.count or 50
        self.knows: list[float] = []
        self.next: list[float] = []

    def more(self) -> bool:
        few = len(self.next) < 3 or time.perf_counter() < self.until
        return few and len(self.next) < self.most

    def add(self, begin: float, knows: float, answered: float) -> None:
        self.knows.append((knows - begin) * 1e3)
        self.next.append((answered - begin) * 1e3)

    def sample(self, package: str) -> Sample:
        return {
            "n": len(self.next),
            "seconds": sum(self.next) / 1e3,
            "knows_ms": self.knows,
            "next_ms": self.next,
            "versions": versions(package),
        }


def _lost_async(
    made: Callable[[], AbstractAsyncContextManager[Call]],
    package: str,
    cancel: bool,
    goal: Goal,
) -> Sample:
    meeting = Meeting()
    meeting.sock.setblocking(False)

    async def main() -> Sample:
        loop = asyncio.get_running_loop()
        losses = Losses(goal)
        async with made() as call:
            await call(target.echo, 0)
            while losses.more():
                task = asyncio.ensure_future(call(target.meet, meeting.address))
                sock, _ = await loop.sock_accept(meeting.sock)
                sock.setblocking(False)
                with sock:
                    pid = int.from_bytes(await loop.sock_recv(sock, 8), "little")
                    await asyncio.sleep(0.02)  # the machine is quiet again
                    begin = time.perf_counter()
                    if cancel:
                        task.cancel()
                    else:
                        os.kill(pid, signal.SIGKILL)
                    try:
                        await task
                    except (asyncio.CancelledError, Exception):
                        knows = time.perf_counter()
                    await call(target.echo, 0)
                    losses.add(begin, knows, time.perf_counter())
        return losses.sample(package)

    try:
        return run_async(main)
    finally:
        meeting.close()


def lost_pool_kill(goal: Goal) -> Sample:
    return _lost_async(pool(), "afork", False, goal)


def lost_pool_cancel(goal: Goal) -> Sample:
    return _lost_async(pool(), "afork", True, goal)


@asynccontextmanager
async def _anyio_cancellable() -> AsyncIterator[Call]:
    load("anyio")
    from anyio import CapacityLimiter, to_process

    limiter = CapacityLimiter(1)
    yield lambda fn, *args: to_process.run_sync(
        fn, *args, cancellable=True, limiter=limiter
    )


def lost_anyio_cancel(goal: Goal) -> Sample:
    return _lost_async(_anyio_cancellable, "anyio", True, goal)


def _lost_blocking(
    make: Callable[[], Any],
    schedule: Callable[[Any], Any],
    remake: bool,
    package: str,
    cancel: bool,
    goal: Goal,
) -> Sample:
    """``remake``: a pool that has lost a worker is of no more use."""
    meeting = Meeting()
    losses = Losses(goal)
    pool = make()
    schedule(pool)(target.echo, 0).result()
    while losses.more():
        future = schedule(pool)(target.meet, meeting.address)
        _, pids, there = meeting.wait(1)
        time.sleep(0.02)
        begin = time.perf_counter()
        if cancel:
            future.cancel()
        else:
            os.kill(pids[0], signal.SIGKILL)
        try:
            future.result(30)
        except BaseException:
            knows = time.perf_counter()
        if remake:
            pool = make()
        schedule(pool)(target.echo, 0).result(30)
        losses.add(begin, knows, time.perf_counter())
        there[0].close()
    if hasattr(pool, "shutdown"):
        pool.shutdown()
    else:
        pool.stop()
        pool.join()
    meeting.close()
    return losses.sample(package)


def _lost_pebble(cancel: bool, goal: Goal) -> Sample:
    module = load("pebble")
    return _lost_blocking(
        lambda: module.ProcessPool(1, context=forkserver()),
        _schedule,
        False,
        "pebble",
        cancel,
        goal,
    )


def lost_pebble_kill(goal: Goal) -> Sample:
    return _lost_pebble(False, goal)


def lost_pebble_cancel(goal: Goal) -> Sample:
    return _lost_pebble(True, goal)


def lost_loky_kill(goal: Goal) -> Sample:
    module = load("loky")
    return _lost_blocking(
        lambda: module.get_reusable_executor(1),
        lambda pool: pool.submit,
        True,
        "loky",
        False,
        goal,
    )


def lost_ppe_kill(goal: Goal) -> Sample:
    from concurrent.futures import ProcessPoolExecutor

    context = forkserver()
    return _lost_blocking(
        lambda: ProcessPoolExecutor(1, mp_context=context),
        lambda pool: pool.submit,
        True,
        "concurrent.futures",
        False,
        goal,
    )


def lost_trio_cancel(goal: Goal) -> Sample:
    load("trio_parallel")
    import trio as trio_
    import trio_parallel

    meeting = Meeting()
    losses = Losses(goal)

    async def main() -> None:
        listener = trio_.socket.from_stdlib_socket(meeting.sock)
        limiter = trio_.CapacityLimiter(1)
        await trio_parallel.run_sync(target.echo, 0, limiter=limiter)
        while losses.more():
            done = trio_.Event()
            scope = trio_.CancelScope()

            async def run(scope: Any = scope, done: Any = done) -> None:
                with scope:
                    await trio_parallel.run_sync(
                        target.meet,
                        meeting.address,
                        kill_on_cancel=True,
                        limiter=limiter,
                    )
                done.set()

            async with trio_.open_nursery() as nursery:
                nursery.start_soon(run)
                sock, _ = await listener.accept()
                await sock.recv(8)
                await trio_.sleep(0.02)
                begin = time.perf_counter()
                scope.cancel()
                await done.wait()
                knows = time.perf_counter()
                await trio_parallel.run_sync(target.echo, 0, limiter=limiter)
                losses.add(begin, knows, time.perf_counter())
                sock.close()

    trio_.run(main)
    return losses.sample("trio-parallel")
