"""The job of ``python -m afork demo``.

A set of HTTP servers on one socket, watched from outside: this process is the
application, the client, and the one that kills a worker under load.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import os
import platform
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import afork

from ._demo_check import FATAL, question
from .pool._core import usable_cpus

WORKERS = 4
REQUESTS = 2_000
AT_ONCE = 32
#: Answers that are checked by one call.
BATCH = 100
#: Seconds for everything.
LIMIT = 60.0

HOST = "127.0.0.1"


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a process has in memory, in KiB."""

    private: int
    shared: int
    pss: int

    @classmethod
    def of(cls, pid: int | None) -> Memory | None:
        """From procfs; None where that cannot be read."""
        try:
            with open(f"/proc/{pid}/smaps_rollup") as file:
                lines = [line.split() for line in file][1:]
        except OSError:
            return None
        size = {words[0]: int(words[1]) for words in lines}
        return cls(
            size["Private_Clean:"] + size["Private_Dirty:"],
            size["Shared_Clean:"] + size["Shared_Dirty:"],
            size["Pss:"],
        )


@dataclasses.dataclass
class Row:
    """One process in the table that is printed."""

    name: str
    fork: afork.Fork
    seconds: float
    served: int | None = None
    memory: Memory | None = None
    status: int | None = None
    #: Our end of the socket of a worker.
    sock: socket.socket | None = None
    #: How many answers a worker says that it has given.
    claims: int | None = None


class Servers:
    """Workers on one socket, forked from one template, replaced when they die."""

    def __init__(self, template: afork.Fork) -> None:
        self.template = template
        self.rows: list[Row] = []
        self.replaced = asyncio.Event()
        self._stopping = False

    async def start(self) -> Row:
        """Fork one more worker, and wait until it has entered its function."""
        began = time.perf_counter()
        fork = self.template.fork()
        sock = await fork.run("afork._demo_worker.serve")
        seconds = time.perf_counter() - began
        row = Row(f"worker {len(self.rows) + 1}", fork, seconds, sock=sock)
        self.rows.append(row)
        return row

    async def supervise(self, row: Row) -> None:
        """See one worker to its end, and its successors to theirs."""
        row.status = await row.fork.wait()
        if self._stopping:
            return
        new = await self.start()
        say(
            f"   {row.name} (pid {row.fork.pid}) is dead, killed in the middle of an "
            f"answer.\n   {new.name} (pid {new.fork.pid}) has taken its place after "
            f"{milliseconds(new.seconds)} ms."
        )
        self.replaced.set()
        await self.supervise(new)

    def find(self, pid: int) -> Row:
        return next(row for row in self.rows if row.fork.pid == pid)

    async def stop(self) -> None:
        """Ask the workers to end, and how much they have done."""
        self._stopping = True
        for row in self.rows:
            assert row.sock is not None
            if row.status is None:
                row.sock.shutdown(socket.SHUT_WR)
                row.claims = int(await read_to_end(row.sock))
            row.sock.close()


class Client:
    """Asks the servers, many requests at once, until each has its answer."""

    def __init__(self, servers: Servers, port: int) -> None:
        self._servers = servers
        self._port = port
        self.answers: dict[int, tuple[int, bytes]] = {}  # pid, body
        self.lost = 0
        self.refused = 0

    async def ask_all(self) -> None:
        numbers = iter(range(REQUESTS))
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(self._ask_some(numbers))

    async def _ask_some(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            while number not in self.answers:
                try:
                    self.answers[number] = await self._ask(number)
                except ConnectionRefusedError:
                    self.refused += 1
                except (ConnectionError, asyncio.IncompleteReadError):
                    self.lost += 1

    async def _ask(self, number: int) -> tuple[int, bytes]:
        if number != FATAL:
            return await self._get(f"/next-prime/{question(number)}")
        # The table is more than the sockets hold: while we do not read on, its
        # sender is in the middle of it, and can be killed there.
        return await self._get("/table", None if self.lost else self._kill)

    def _kill(self, pid: int) -> None:
        victim = self._servers.find(pid)
        victim.memory = Memory.of(pid)
        victim.fork.kill()

    async def _get(
        self, path: str, on_head: Callable[[int], None] | None = None
    ) -> tuple[int, bytes]:
        """One HTTP request: the pid of the worker that answers, and the answer."""
        reader, writer = await asyncio.open_connection(HOST, self._port)
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            status, *lines = head.split("\r\n")
            if status.split()[1] != "200":
                raise RuntimeError(f"{path}: {status}")
            fields = dict(line.split(": ", 1) for line in lines if line)
            pid = int(fields["X-Pid"])
            if on_head is not None:
                on_head(pid)
            return pid, await reader.readexactly(int(fields["Content-Length"]))
        finally:
            writer.close()
            try:
                await writer.wait_closed()
            except ConnectionError:
                pass  # of a killed worker


@dataclasses.dataclass(frozen=True)
class Result:
    """What has happened, to be compared with what was promised."""

    servers: Servers
    client: Client
    others: list[Row]
    output: bytes
    #: The numbers of the requests whose answers are right.
    right: set[int]


async def run() -> Result:
    """Everything, in order."""
    began = time.perf_counter()
    listener = socket.create_server((HOST, 0), backlog=4 * AT_ONCE)
    # Accepted connections inherit the size of this buffer.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    listener.setblocking(False)  # of several workers one gets the connection
    port = listener.getsockname()[1]

    say("1. A template loads a server, once, and is sent a listening socket.")
    template = await (
        afork.Fork.new()
        .require("afork._demo_worker")
        .eval("afork._demo_worker.prepare()")
        .send_fh(listener)
        .ready()
    )
    listener.close()
    top = Row("template", template, time.perf_counter() - began)

    say(f"2. {WORKERS} workers are forked from it. All accept on {HOST}:{port}.")
    servers = Servers(template)
    client = Client(servers, port)
    async with asyncio.TaskGroup() as group:
        for _ in range(WORKERS):
            group.create_task(servers.supervise(await servers.start()))

        say(f"3. {REQUESTS:,} HTTP requests, {AT_ONCE} at a time.")
        began = time.perf_counter()
        await client.ask_all()
        seconds = time.perf_counter() - began
        await servers.replaced.wait()
        for row in (top, *servers.rows):
            row.memory = row.memory or Memory.of(row.fork.pid)
        await servers.stop()
    count = collections.Counter(pid for pid, _ in client.answers.values())
    for row in servers.rows:
        row.served = count[row.fork.pid or 0]
    say(
        f"   {len(client.answers):,} answers in {seconds:.2f} s, "
        f"{len(client.answers) / seconds:,.0f} a second; {client.refused} refused; "
        f"{client.lost} lost\n   with the killed worker, and asked for again."
    )

    say("4. A program counts the answers by pid: sort | uniq -c, output captured.")
    program, output = await run_program(client)

    template.close()
    top.status = await template.wait()

    say(f"5. A pool of {usable_cpus()} processes checks every answer.")
    right = await check(client.answers)

    print_table([top, *servers.rows, program])
    return Result(servers, client, [top, program], output, right)


async def check(answers: dict[int, tuple[int, bytes]]) -> set[int]:
    """The numbers of the right answers, found by many processes."""
    began = time.perf_counter()
    bar = Bar(len(answers))
    items = [(number, body) for number, (_, body) in answers.items()]
    batches = [items[i : i + BATCH] for i in range(0, len(items), BATCH)]
    right: set[int] = set()
    async with afork.Pool("afork._demo_check.check", on_event=bar.on_event) as pool:
        async for some in pool.map(None, batches, ordered=False):
            right.update(some)
    bar.end()
    seconds = time.perf_counter() - began
    say(f"   {len(right):,} of {len(answers):,} are right, in {seconds:.2f} s.")
    return right


class Bar:
    """A progress bar, on a terminal."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.shown = sys.stdout.isatty()

    def on_event(self, event: afork.Event) -> None:
        """A process has got a little further."""
        (more,) = event.args
        self.done += more
        if self.shown:
            width = 60 * self.done // self.total
            bar = f"{'#' * width}{'.' * (60 - width)}"
            print(f"\r   [{bar}] {100 * self.done // self.total} %", end="", flush=True)

    def end(self) -> None:
        if self.shown:
            print(f"\r{' ' * 72}\r", end="", flush=True)


async def run_program(client: Client) -> tuple[Row, bytes]:
    """Have a program do its work in a process of its own; its output."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        log.writelines(b"%d\n" % pid for pid, _ in client.answers.values())
        log.seek(0)
        fork = afork.Fork.new()
        sock = await fork.exec(
            "sh", "-c", "sort -n | uniq -c", stdin=log, stdout=afork.SOCKET
        )
    row = Row("program", fork, time.perf_counter() - began)
    assert sock is not None
    output = await read_to_end(sock)
    sock.close()
    for line in output.decode().splitlines():
        say(f"   {line.strip()}")
    row.status = await fork.wait()
    return row, output


async def read_to_end(sock: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while chunk := await loop.sock_recv(sock, 65536):
        data += chunk
    return data


# -- what was promised


def promises_kept(result: Result) -> bool:
    """Check each promise, and say which was broken."""
    servers, client = result.servers, result.client
    killed = [row for row in servers.rows if row.status == -signal.SIGKILL]
    alive = [row for row in servers.rows if row not in killed]
    lines = (line.split() for line in result.output.splitlines())
    counted = {int(pid): int(n) for n, pid in lines}
    kept = {
        "every request has its answer": len(client.answers) == REQUESTS,
        "every answer is right": result.right == set(client.answers),
        "no request was refused": client.refused == 0,
        "one worker was killed": len(killed) == 1,
        "it has taken one request with it": client.lost == 1,
        "it was replaced": len(alive) == WORKERS,
        "the new worker has served": bool(servers.rows[-1].served),
        "workers have given as many answers as have arrived": all(
            row.claims == row.served for row in alive
        ),
        "the program has counted the same": counted
        == {row.fork.pid: row.served for row in servers.rows if row.served},
        "all the others have ended with status 0": all(
            row.status == 0 for row in (*alive, *result.others)
        ),
    }
    for promise, was_kept in kept.items():
        if not was_kept:
            say(f"BROKEN: {promise}")
    if all(kept.values()):
        say("Everything as promised.")
    return all(kept.values())


# -- what is printed


def say(text: str) -> None:
    print(text, flush=True)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"


def status_text(status: int | None) -> str:
    if status is None:
        return "unknown"
    if status < 0:
        return f"{status} ({signal.Signals(-status).name})"
    return str(status)


def print_table(rows: list[Row]) -> None:
    heads = ("process", "pid", "requests", "start", "private", "shared", "PSS")
    units = ("", "", "served", "ms", "KiB", "KiB", "KiB")
    form = "{:<10} {:>7} {:>9} {:>7} {:>9} {:>9} {:>9}   {}"
    say("")
    say(form.format(*heads, "exit status"))
    say(form.format(*units, "").rstrip())
    say("-" * 80)
    for row in rows:
        memory = dataclasses.astuple(row.memory) if row.memory else ("-",) * 3
        say(
            form.format(
                row.name,
                row.fork.pid or "-",
                "-" if row.served is None else f"{row.served:,}",
                milliseconds(row.seconds),
                *(f"{n:,}" if isinstance(n, int) else n for n in memory),
                status_text(row.status),
            )
        )
    say("")
    say("Shared with the template and one another are the server's table and most of")
    say("the interpreter. PSS is what is private and a fair part of what is shared.")
    say("")


def main() -> int:
    """The whole demo; its exit status."""
    say(
        f"afork {afork.__version__}, Python {platform.python_version()}, "
        f"Linux {platform.release()}, {os.cpu_count()} CPUs\n"
    )

    async def bounded() -> Result:
        async with asyncio.timeout(LIMIT):
            return await run()

    try:
        result = asyncio.run(bounded())
    except TimeoutError:
        say(f"BROKEN: not finished after {LIMIT:.0f} s")
        return 1
    return 0 if promises_kept(result) else 1
