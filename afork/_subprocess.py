"""Programs started by a template, with the surface of asyncio.subprocess.

asyncio's own way stops the event loop from fork until the program's first
instruction; here that happens in the template, and the loop only sends a
message. Streams, pipes and the process object are asyncio's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from asyncio import base_subprocess
from asyncio.subprocess import Process as AsyncioProcess
from asyncio.subprocess import SubprocessStreamProtocol
from collections.abc import Callable, Mapping
from typing import IO, Any

from . import _afork
from ._default import default_template
from ._errors import TemplateError
from ._exec import PathLike, Request
from ._handles import descriptor_of, is_stream
from ._hub import hub
from ._process import Process, logger
from ._state import next_id

_LIMIT = 2**16

#: Arguments of subprocess.Popen that have no meaning here, and the only value
#: that asks for nothing.
_FIXED: dict[str, object] = {
    "preexec_fn": None,
    "close_fds": True,
    "restore_signals": True,
    "startupinfo": None,
    "creationflags": 0,
    "user": None,
    "group": None,
    "extra_groups": None,
    "pipesize": -1,
}

#: Those that asyncio's streams, which are of bytes, do not have either.
_BYTES: dict[str, object] = {
    "bufsize": 0,
    "universal_newlines": False,
    "text": False,
    "encoding": None,
    "errors": None,
}


async def create_subprocess_exec(
    program: PathLike,
    *args: PathLike,
    stdin: int | IO[Any] | None = None,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
    limit: int = _LIMIT,
    executable: PathLike | None = None,
    env: Mapping[str, str] | None = None,
    cwd: PathLike | None = None,
    pass_fds: tuple[int, ...] = (),
    start_new_session: bool = False,
    process_group: int | None = None,
    umask: int = -1,
    **fixed: object,
) -> AsyncioProcess:
    """Start a program; arguments and result as asyncio's function of that name.

    Streams of None, the environment, the working directory and the umask are
    this process's own at the call. The program runs in the template's session
    and is killed when the application dies.

    Args:
        program: Searched in PATH unless it has a slash.
        args: Its arguments.
        stdin: None, PIPE, DEVNULL (of asyncio.subprocess), or a file.
        stdout: The same.
        stderr: The same, or STDOUT.
        limit: Bytes that a stream reader buffers.
        executable: What to execute; `program` is then only argv[0].
        env: Its whole environment.
        cwd: Its working directory.
        pass_fds: Descriptors that it gets under the same numbers.
        start_new_session: Whether it leads a session of its own.
        process_group: Group to join, or 0 for one of its own.
        umask: File mode creation mask, or -1 for ours.
        fixed: Other arguments of subprocess.Popen, accepted with the value
            that asks for nothing.

    Raises:
        OSError: the program cannot be executed; errno and ``filename`` say why.
        ValueError: an argument that cannot be honoured from another process.
        TemplateError: the template has died meanwhile.
    """
    for name, value in fixed.items():
        if name in _BYTES:
            only = _BYTES[name]
            if value != only and (value or only is None):
                raise ValueError(f"{name} must be {only}: the streams are of bytes")
        elif name not in _FIXED:
            raise TypeError(f"unexpected keyword argument {name!r}")
        elif value != _FIXED[name]:
            raise ValueError(f"{name} is not possible: a template starts the program")
    argv0 = None
    if executable is not None:
        argv0, program = program, executable
    request = Request(
        program,
        args,
        env=_afork.get_environ() if env is None else env,
        cwd=cwd,
        argv0=argv0,
        umask=_afork.get_umask() if umask < 0 else umask,
        group=-1 if process_group is None else process_group,
        session=start_new_session,
    )
    loop = hub().attach()
    pipes: dict[int, IO[bytes]] = {}
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        for to, stream in ((0, stdin), (1, stdout)):
            _add_stream(request, to, stream, pipes, ours, theirs)
        if stderr == subprocess.STDOUT:
            request.same(1, 2)
        else:
            _add_stream(request, 2, stderr, pipes, ours, theirs)
        for fd in pass_fds:
            os.fstat(fd)
            request.map_handle(fd, fd)
        if not request.cwd.startswith(b"/"):  # ours, or relative to ours
            try:
                request.cwd = os.path.join(os.getcwdb(), request.cwd)
            except FileNotFoundError:  # it was removed, but can be worked in
                here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                theirs.callback(os.close, here)
                request.use_cwd(here)
        process = _start(request)
        theirs.close()
        try:
            await process.until(lambda: process.executed or process.error is not None)
        except BaseException:
            process.kill()
            raise
        process.raise_error()
        ours.pop_all()  # the transport owns the pipes from here on
    protocol = SubprocessStreamProtocol(limit=limit, loop=loop)
    waiter = loop.create_future()
    streams = (subprocess.PIPE if to in pipes else None for to in (0, 1, 2))
    make: Any = _Transport  # typeshed knows only the arguments of Popen
    transport = make(
        loop,
        protocol,
        [program, *args],
        False,
        *streams,
        0,
        waiter=waiter,
        process=process,
        pipes=pipes,
    )
    try:
        await waiter
    except BaseException:
        transport.close()
        await transport._wait()
        raise
    return AsyncioProcess(transport, protocol, loop)


async def create_subprocess_shell(
    cmd: str | bytes,
    stdin: int | IO[Any] | None = None,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
    limit: int = _LIMIT,
    **kwds: Any,
) -> AsyncioProcess:
    """Run a command line by the shell; else as `create_subprocess_exec`."""
    if not isinstance(cmd, (str, bytes)):
        raise ValueError("cmd must be a string")
    executable = kwds.pop("executable", None) or "/bin/sh"
    return await create_subprocess_exec(
        executable,
        "-c",
        cmd,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        limit=limit,
        **kwds,
    )


def _add_stream(
    request: Request,
    to: int,
    stream: int | IO[Any] | None,
    pipes: dict[int, IO[bytes]],
    ours: contextlib.ExitStack,
    theirs: contextlib.ExitStack,
) -> None:
    """One of the three streams: what the program gets, what we keep."""
    if stream == subprocess.PIPE:
        reading, writing = os.pipe()
        mine, its = (writing, reading) if to == 0 else (reading, writing)
        pipes[to] = ours.enter_context(os.fdopen(mine, "wb" if to == 0 else "rb", 0))
        theirs.callback(os.close, its)
        request.map_handle(its, to)
        return
    if stream is None:
        if is_stream(to):
            request.map_handle(to, to)
            return
        stream = subprocess.DEVNULL  # closed here: nothing else may be there
    if stream == subprocess.DEVNULL:
        request.map_null(to)
    elif stream == subprocess.STDOUT:
        raise ValueError("STDOUT can only be used for stderr")
    else:
        fd = descriptor_of(stream)
        os.fstat(fd)
        request.map_handle(fd, to)


def _start(request: Request) -> Process:
    """Ask the default template for the program."""
    with hub().lock:
        template = default_template()
        assert template.channel is not None
        process = Process(None, id=next_id(), parent=template)
        process.claimed = "exec"
        names = os.fsdecode(request.cwd), os.fsdecode(request.program)
        process.names = ("", "", "", *names)  # by stage of failure
        request.queue(
            template.channel, _afork.CMD_SPAWN, process.id.to_bytes(8, sys.byteorder)
        )
        template.children[process.id] = process
        process.expect_exit()
        template.flush()
        if template.broken:
            # It has died since it was used last; nothing was sent, so once more.
            template.children.pop(process.id, None)
            return _start_again(request, template)
    return process


def _start_again(request: Request, dead: Process) -> Process:
    template = default_template()
    if template is dead or template.broken:
        raise TemplateError("the template has died", template.pid, template.status)
    return _start(request)


class _Popen:
    """What BaseSubprocessTransport wants to know of a subprocess.Popen."""

    def __init__(self, process: Process, pipes: dict[int, IO[bytes]]) -> None:
        self.pid = process.pid
        self.returncode: int | None = None
        self.stdin, self.stdout, self.stderr = (pipes.get(fd) for fd in (0, 1, 2))
        self._process = process

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.send_signal(9)


class _Transport(base_subprocess.BaseSubprocessTransport):
    """asyncio's transport over a process that is not our child."""

    def _start(  # type: ignore[override]
        self, *, process: Process, pipes: dict[int, IO[bytes]], **_: object
    ) -> None:
        self._process = process
        self._proc: Any = _Popen(process, pipes)
        process.when_exited(self._tell(self._loop))

    def _tell(self, loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
        def tell() -> None:
            # Reported to whichever loop of this process was awake.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._ended)

        return tell

    def _ended(self) -> None:
        status = self._process.status
        if status is None:
            logger.warning("exit status of process %s is unknown", self._process.pid)
            code = 255  # as asyncio says it
        else:
            code = os.waitstatus_to_exitcode(status)
        self._process_exited(code)

    # By pidfd: newer asyncio would use the number, which may be another's.

    def send_signal(self, signal: int) -> None:
        self._check_proc()
        self._process.send_signal(signal)

    def terminate(self) -> None:
        self.send_signal(15)

    def kill(self) -> None:
        self.send_signal(9)
