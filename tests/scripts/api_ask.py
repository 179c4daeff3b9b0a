"""Helpers of the API tests: ask a process about itself."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import os
import select
from pathlib import Path
from typing import Any

import afork

ROOT = Path(__file__).parents[2]
PACKAGE = Path(afork.__file__).parents[1]

#: For applications in a fresh interpreter: the package under test, which may
#: be an installed one, and only then this folder, for these helpers.
PYTHONPATH = f"{PACKAGE}:{ROOT}"


async def read_all(sock: Any) -> bytes:
    """Everything that comes out of a socket until its end; closes it."""
    loop = asyncio.get_running_loop()
    data = b""
    with sock, contextlib.suppress(ConnectionResetError):
        while chunk := await loop.sock_recv(sock, 65536):
            data += chunk
    return data


async def ask(f: afork.Fork, expression: str) -> Any:
    """Run a process; what an expression is worth in it, which must be a literal.

    The expression may use os, sys, sock and args, the arguments.
    """
    f.eval(
        f"""
        def _answer(sock, *args):
            import os, sys
            sock.sendall(repr({expression}).encode())
        """
    )
    answer = await read_all(await f.run("_answer"))
    return ast.literal_eval(answer.decode())


async def read_pipe(fd: int) -> bytes:
    """Everything that comes out of a pipe until its end; closes it."""
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", 0)
    )
    try:
        return await reader.read()
    finally:
        transport.close()


async def code_is_lost_or(code: int, f: afork.Fork) -> bool:
    """Wait for a process whose status only some kernels tell."""
    try:
        return await f.wait() == code == f.returncode
    except afork.WorkerLost as exc:
        return (exc.pid, exc.status, f.returncode) == (f.pid, None, None)


def ended(pid: int, seconds: float = 10.0) -> bool:
    """Wait for the end of any process of this machine."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], seconds)[0])
    finally:
        os.close(fd)


def status_of(pid: int | str = "self") -> dict[str, str]:
    """The fields of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {k: v.strip() for k, _, v in (line.partition(":") for line in lines)}
