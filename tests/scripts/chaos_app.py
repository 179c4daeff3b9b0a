"""The application that chaos.py does its worst to.

Starts whatever can be started, at random, and holds that every call ends, with
the right result or one of the errors of the manual, and that nothing is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import logging
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import pool_jobs as jobs

import afork
import afork._default

HANG = 10.0
ACTORS = 8
CODE = """
import os, signal
def answer(sock, *args):
    sock.sendall(repr(args).encode())
def linger(sock, *args):
    sock.recv(1)
def crash(sock, *args):
    os.kill(os.getpid(), signal.SIGKILL)
"""
#: What may become of a call when processes die and descriptors run out.
TYPED = (afork.AforkError, OSError, asyncio.CancelledError)
#: Of exceptions raised there.
REMOTE = {"OSError", "BrokenPipeError", "ConnectionResetError", "MemoryError"}
#: What the log may hold of processes that nobody awaits.
LOGGED = ("failed: ", "of a pool could", "status of process", "has ended: ")


class App:
    def __init__(self, seed: int, seconds: float) -> None:
        self.rng = random.Random(seed)
        self.end = time.monotonic() + seconds
        self.faults: list[str] = []
        self.outcomes: Counter[str] = Counter()
        self.templates: list[afork.Fork] = []
        self.pools: list[afork.Pool] = []
        self.numbers = iter(range(1 << 60))

    def fault(self, text: str) -> None:
        self.faults.append(text)
        print("FAULT", text, flush=True)

    async def ends(self, what: str, awaitable, cancel: bool = True):
        """Its result or its error, and that within HANG seconds."""
        task = asyncio.ensure_future(awaitable)
        cancelled = cancel and self.rng.random() < 0.08
        if cancelled:
            for _ in range(self.rng.randrange(30)):
                await asyncio.sleep(0)
            task.cancel()
        done, _ = await asyncio.wait({task}, timeout=HANG)
        if not done:
            out = io.StringIO()
            if isinstance(task, asyncio.Task):
                task.print_stack(file=out)
            self.fault(f"{what} hangs: {task!r} {out.getvalue()}")
            self.tell()
            task.cancel()
            await asyncio.wait({task}, timeout=1)
        if task.cancelled():
            self.outcomes[f"{what}: cancelled"] += 1
            if not cancelled and done and not what.startswith("pool"):
                self.fault(f"{what} is cancelled by nobody")
            raise asyncio.CancelledError
        error = task.exception() if task.done() else None
        self.outcomes[f"{what}: {type(error).__name__ if error else 'good'}"] += 1
        if error is None:
            return task.result()
        if not isinstance(error, TYPED):
            if not isinstance(error, ValueError) or "expected" not in str(error):
                self.fault(f"{what}: " + "".join(traceback.format_exception(error)))
        elif (
            isinstance(error, afork.RemoteError)
            and error.type not in REMOTE
            and "Too many open files" not in str(error)
        ):
            self.fault(f"{what}: {error.type}: {error}")
        try:
            raise error
        finally:
            # It would keep our callers, and the starts that they hold, until
            # garbage is collected: then in any order, the sockets first.
            del error, task

    def tell(self) -> None:
        """What the pools are waiting for."""
        for pool in self.pools:
            core = pool._core
            print(pool.stats() if core else pool, core and core.template._fork)
            for worker in [*core.workers, *core.leaving] if core else ():
                process = worker.fork._process
                print("   ", worker in core.workers, vars(worker), vars(process))
                if process.pid:
                    with contextlib.suppress(OSError):
                        stat = Path(f"/proc/{process.pid}/stat").read_text()
                        print("       ", stat[:60], flush=True)

    async def actor(self) -> None:
        actions = [getattr(self, x) for x in dir(self) if x.startswith("do_")]
        while time.monotonic() < self.end:
            action = self.rng.choice(actions)
            try:
                await action()
            except TYPED:
                pass
            except ValueError as error:
                if "expected" not in str(error):
                    self.fault("".join(traceback.format_exception(error)))
            except Exception as error:
                self.fault("".join(traceback.format_exception(error)))

    # -- what there is to choose from

    async def template(self) -> afork.Fork:
        if len(self.templates) < 4:
            f = self.rng.choice([afork.Fork.new, afork.Fork.new_exec])()
            f.eval(CODE).spares(self.rng.choice([0, 0, 1, 4]))
            self.templates.append(f)
        f = self.rng.choice(self.templates)
        if self.rng.random() < 0.05 or f._process.gone:
            self.templates.remove(f)
            with contextlib.suppress(OSError):
                self.rng.choice([f.close, f.kill])()
            await self.ends("wait", f.wait())
        return f

    async def one(self) -> afork.Fork:
        if self.rng.random() < 0.3:
            return afork.Fork.new().eval(CODE)
        return (await self.template()).fork()

    async def read(self, sock) -> bytes:
        loop = asyncio.get_running_loop()
        data = b""
        with sock:
            while chunk := await self.ends("recv", loop.sock_recv(sock, 65536), False):
                data += chunk
        return data

    # -- what is done

    async def do_run(self) -> None:
        f = await self.one()
        number = str(next(self.numbers))
        sock = await self.ends("run", f.send_arg(number).run("answer"))
        data = await self.read(sock)
        if data != repr((number,)).encode() and data:
            self.fault(f"run: {data!r} for {number}")

    async def do_run_and_wait(self) -> None:
        f = await self.one()
        r, w = os.pipe()
        try:
            f.send_fh(w)
        finally:
            os.close(r)
            os.close(w)
        func = self.rng.choice(["linger", "crash"])
        with await self.ends("run", f.run(func)):
            if self.rng.random() < 0.5:
                with contextlib.suppress(ProcessLookupError):
                    f.send_signal(self.rng.choice([signal.SIGKILL, signal.SIGTERM]))
        await self.ends("wait", f.wait())

    async def do_forget(self) -> None:
        f = await self.one()
        f.run("answer")

    async def do_drop(self) -> None:
        f = await self.one()
        f.eval("pass")

    async def do_many(self) -> None:
        template = await self.template()
        forks = template.fork_many(self.rng.randrange(12))
        runs = [f.run("answer") for f in forks]
        for run in runs:
            await self.read(await self.ends("run of many", run))

    async def do_nested(self) -> None:
        f = await self.one()
        inner = f.fork()
        await self.ends("ready", inner.ready())
        await self.read(await self.ends("run nested", inner.run("answer")))
        await self.read(await self.ends("run copy", f.run("answer")))
        await self.ends("wait", f.wait())

    async def do_change(self) -> None:
        template = await self.template()
        template.eval("x = 1").spares(self.rng.randrange(5))
        await self.ends("ready", template.ready())
        await self.ends("stats", template.stats())

    async def do_context(self) -> None:
        async with await self.one() as f:
            await self.ends("ready", f.ready())

    async def do_exec(self) -> None:
        f = await self.one()
        sock = await self.ends(
            "exec", f.exec("cat", stdin=afork.SOCKET, stdout=afork.SOCKET)
        )
        loop = asyncio.get_running_loop()
        with contextlib.closing(sock):
            await self.ends("send", loop.sock_sendall(sock, b"x"), False)
            await self.ends("recv", loop.sock_recv(sock, 1), False)
        await self.ends("wait", f.wait())

    async def do_exec_fails(self) -> None:
        f = await self.one()
        # Without an error it was killed before: the end of file says no more.
        with contextlib.suppress(FileNotFoundError):
            await self.ends("exec /nowhere", f.exec("/nowhere"))

    async def do_program(self) -> None:
        p = await self.ends(
            "create_subprocess",
            afork.create_subprocess_exec("cat", stdin=-1, stdout=-1, stderr=-1),
        )

        async def communicate(text: bytes) -> bytes:
            try:
                return (await p.communicate(text))[0]
            except RuntimeError as exc:  # uvloop's own programs do that as well
                if "the handler is closed" in str(exc):
                    raise BrokenPipeError from exc
                raise

        text = b"x" * self.rng.choice([0, 10, 200_000])
        try:
            out = await self.ends("communicate", communicate(text), False)
        finally:
            if p.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    p.kill()
            await self.ends("program wait", p.wait(), False)
        if p.returncode == 0 and out != text:
            self.fault(f"program: {len(out)} of {len(text)}")

    async def do_handover(self) -> None:
        f = await self.one()
        sock = await self.ends("to_fh", f.to_fh())
        try:
            other = afork.Fork.new_from_fh(sock)
        finally:
            sock.close()
        await self.read(await self.ends("run", other.run("answer")))

    async def do_rpc(self) -> None:
        rpc = (await self.one()).rpc("pool_jobs.add")
        try:
            for _ in range(self.rng.randrange(4)):
                number = next(self.numbers)
                if await self.ends("rpc", rpc(number, 1)) != number + 1:
                    self.fault("rpc: wrong answer")
            if self.rng.random() < 0.3:
                await self.ends("rpc", rpc(b"x" * 300_000, b"y"))
        finally:
            await self.ends("rpc close", rpc.close(), False)

    def pool(self) -> afork.Pool:
        if len(self.pools) < 2:
            rng = self.rng
            pool = afork.Pool(
                max=rng.randrange(1, 4),
                load=rng.randrange(1, 4),
                idle=rng.randrange(2),
                max_calls=rng.choice([None, 5]),
                stop=rng.choice([0.01, 10]),
                stderr=rng.choice([None, "tail"]),
                logging=rng.random() < 0.2,
            )
            if rng.random() < 0.5:
                pool.template.require("pool_jobs").spares(rng.randrange(4))
            self.pools.append(pool)
        return self.rng.choice(self.pools)

    async def do_pool_call(self) -> None:
        pool = self.pool()
        for _ in range(self.rng.randrange(1, 6)):
            number = next(self.numbers)
            result = await self.ends("pool call", pool.call(jobs.add, number, 1))
            if result != number + 1:
                self.fault(f"pool: {result} for {number}")

    async def do_pool_large(self) -> None:
        data = os.urandom(self.rng.choice([100, 300_000]))
        result = await self.ends("pool large", self.pool().call(jobs.echo, data))
        if result != ((data,), {}):
            self.fault("pool: wrong answer")

    async def do_pool_fail(self) -> None:
        call = self.pool().call(jobs.fail, ValueError, "expected")
        await self.ends("pool fail", call)
        self.fault("pool: no error")

    async def do_pool_crash(self) -> None:
        await self.ends("pool crash", self.pool().call(os._exit, 3))
        self.fault("pool: no error")

    async def do_pool_many(self) -> None:
        pool = self.pool()
        calls = [pool.call(jobs.add, i, 1) for i in range(20)]
        for i, call in enumerate(calls):
            with contextlib.suppress(afork.AforkError, OSError, asyncio.CancelledError):
                if await self.ends("pool many", call) != i + 1:
                    self.fault("pool: wrong answer")

    async def do_pool_stream(self) -> None:
        async def read() -> list[int]:
            async with self.pool().stream(jobs.count, 50) as stream:
                return [x async for x in stream]

        items = await self.ends("pool stream", read())
        if items != [*range(50)]:
            self.fault(f"stream: {items}")

    async def do_pool_map(self) -> None:
        async def read() -> list[int]:
            return [x async for x in self.pool().map(jobs.add, range(20))]

        items = await self.ends("pool map", read())
        if items != [*range(20)]:
            self.fault(f"map: {items}")

    async def do_pool_close(self) -> None:
        if self.pools and self.rng.random() < 0.2:
            pool = self.pools.pop()
            timeout = self.rng.choice([0, 0.1, None])
            await self.ends("pool close", pool.close(timeout), False)

    # -- around it

    async def main(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, what: self.fault(f"loop: {what}"))
        # Once without chaos: what a module imports later needs descriptors.
        end, self.end = self.end - time.monotonic(), 0.0
        actions = [getattr(self, x) for x in dir(self) if x.startswith("do_")]
        for action in actions:
            for _ in range(3):
                with contextlib.suppress(*TYPED, ValueError):
                    await action()
        spared = set(self.first)
        await self.dismiss()
        self.end = time.monotonic() + end
        print(*(x.replace(" ", "") for x in spared), flush=True)
        async with asyncio.TaskGroup() as group:
            for _ in range(ACTORS):
                group.create_task(self.actor())
        print("over", flush=True)
        sys.stdin.read()
        await self.dismiss()

    async def dismiss(self) -> None:
        while self.pools:
            with contextlib.suppress(*TYPED):
                await self.ends("last close", self.pools.pop().close(0), False)
        while self.templates:
            f = self.templates.pop()
            with contextlib.suppress(*TYPED):
                f.close()
                await self.ends("last wait", f.wait(), False)

    def run(self, loop_factory) -> None:
        fds, threads = descriptors(), threading.active_count()
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.get_loop()
            self.first = descriptors().values()
            runner.run(self.main())
        gc.collect()
        afork._default.shutdown(HANG)
        gc.collect()
        end = time.monotonic() + HANG
        while (kids := children()) and time.monotonic() < end:
            time.sleep(0.01)
        if kids:
            self.fault(f"children left: {kids}")
        left = {n: to for n, to in descriptors().items() if n not in fds}
        if left:
            self.fault(f"descriptors left: {left}")
        if threading.active_count() != threads:
            self.fault(f"threads left: {threading.enumerate()}")
        print(dict(sorted(self.outcomes.items())), flush=True)


def descriptors() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return found


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def main(seed: int, seconds: float, loop: str = "asyncio") -> int:
    app = App(seed, seconds)

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if record.name == "asyncio" and record.levelno == logging.WARNING:
                return  # of its debug mode: slow steps, programs that still run
            if record.name != "afork" or not any(x in text for x in LOGGED):
                app.fault(f"log: {record.name}: {text} {record.exc_info}")
            elif "nonsense" in text:
                app.fault(f"log: {text}")

    logging.getLogger().addHandler(Handler())

    def unraisable(what) -> None:
        trace = "".join(traceback.format_exception(what.exc_value))
        app.fault(f"unraisable: {what.err_msg} {what.object!r} {trace}")

    sys.unraisablehook = unraisable
    factory = asyncio.new_event_loop
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
        factory().close()  # the first makes a pipe for signals that stays for good
    app.run(factory)
    return bool(app.faults)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), *sys.argv[3:]))
