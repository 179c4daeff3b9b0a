"""Fork: the chainable process object."""

from __future__ import annotations

import operator
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from . import _afork, _interpreter
from ._become import Exec, Run
from ._default import default_fork, early_template, fork_default
from ._errors import AforkError, ClosedError, TemplateError, WorkerLost
from ._exec import Request, Stream
from ._function import function_name
from ._handles import descriptor_of
from ._hub import hub
from ._process import Process, dead_end, fork_process, fork_processes
from ._state import next_id
from ._stats_request import ask_stats

if TYPE_CHECKING:
    import resource
    import socket
    from types import TracebackType

    from ._handles import HandleLike
    from .rpc._call import Event
    from .rpc._rpc import Rpc

StrOrBytes: TypeAlias = "str | bytes"
#: Of the kernel (include/linux/threads.h).
PID_MAX_LIMIT = 1 << 22


class Fork:
    """A process: to be configured, forked, and turned into a worker or program.

    Configuration is synchronous, queues work and returns the object; what has
    to be waited for is async. An object that goes away with nothing left to
    send ends its process, unless that was asked to become something.

    ``Fork()`` is ``Fork.new()``. Objects are not for two threads at once;
    templates behind them may be.
    """

    __slots__ = ("__weakref__", "_process")

    _process: Process

    def __new__(cls) -> Self:
        return cls.new()

    @classmethod
    def _wrap(cls, process: Process) -> Self:
        self = object.__new__(cls)
        self._process = process
        return self

    # -- making processes

    @classmethod
    def new(cls) -> Self:
        """A new empty process, forked from the default template.

        Raises:
            OSError: the template's interpreter cannot be started, or there is
                no descriptor left for the socket.
        """
        return cls._wrap(fork_default())

    @classmethod
    def default(cls) -> Self:
        """The default template: made on first use, and again when it has died.

        What is configured on it is shared by all processes made afterwards.
        """
        found: Self = default_fork(cls._wrap)
        return found

    @classmethod
    def new_exec(
        cls,
        *,
        python: str | os.PathLike[str] | None = None,
        command: Sequence[str | bytes | os.PathLike[str]] | None = None,
    ) -> Self:
        """A process with a fresh interpreter of its own.

        Forked from Early's template if there is one and neither argument is
        given.

        Args:
            python: Path of the interpreter instead of ``afork.python``.
            command: A foreign server, searched in PATH unless it has a slash,
                and its arguments, to which the number of its socket and our
                pid are appended. It is spoken to in plain mode:
                AnyEvent::Fork's protocol and no reports.

        Raises:
            OSError: the program cannot be executed; ``filename`` names it.
        """
        if command is not None:
            if python is not None:
                raise TypeError("python and command exclude each other")
            words: list[str | bytes] = [os.fspath(word) for word in command]
            if not words:
                raise ValueError("command is empty")
            words[0] = _interpreter.find_program(words[0])
            return cls._wrap(_interpreter.spawn(words, dict(os.environb), plain=True))
        early = early_template()
        if early is not None and python is None:
            return cls._wrap(fork_process(early))
        path = os.fspath(python) if python is not None else None
        return cls._wrap(_interpreter.spawn_template(path))

    @classmethod
    def new_from_fh(cls, sock: socket.socket, plain: bool = False) -> Self:
        """Take over a process object that `to_fh` gave away.

        Args:
            sock: Its socket, owned by the new object from now on.
            plain: Whether its peer speaks only the original's protocol.
        """
        import socket as socket_module

        if not isinstance(sock, socket_module.socket):
            raise TypeError(f"a socket is needed, not {type(sock).__name__}")
        if (
            sock.fileno() < 0
            or sock.family != socket_module.AF_UNIX
            or sock.type != socket_module.SOCK_STREAM
        ):
            raise ValueError("an open unix stream socket is needed")
        sock.getpeername()  # OSError unless it is connected
        process = Process(_afork.Channel(sock.detach(), plain), plain=plain)
        process.watch()
        if not plain:
            assert process.channel is not None
            process.channel.strings(_afork.CMD_SET, [b"hello", b""])
            process.flush()
        return cls._wrap(process)

    def fork(self) -> Self:
        """A new process forked from this one, with copies of its arguments."""
        return self._wrap(fork_process(self._open("fork")))

    def fork_many(self, n: int) -> list[Self]:
        """n new processes for one request; see `fork`.

        Their sockets are made by this process and arrive one by one; what is
        configured meanwhile is queued. Without a running loop, configuring one
        waits for its socket.

        Raises:
            ValueError: n is negative, or more than Linux has process numbers.
        """
        process = self._open("fork_many")
        n = operator.index(n)
        if not 0 <= n <= PID_MAX_LIMIT:
            raise ValueError(f"n must be 0 to {PID_MAX_LIMIT}: {n}")
        return [self._wrap(child) for child in fork_processes(process, n)]

    # -- configuring

    def _open(self, what: str) -> Process:
        process = self._process
        if process.claimed:
            raise ClosedError(f"{what} after {process.claimed}")
        if process.released:
            raise ClosedError(f"{what} after close")
        return process

    def _channel(self, what: str) -> tuple[Process, _afork.Channel]:
        process = self._open(what)
        if process.channel is None:
            # It has ended by itself: the error is for whoever awaits.
            return process, _afork.Channel(dead_end())
        return process, process.channel

    def eval(self, code: str, *args: StrOrBytes) -> Self:
        """Run Python code in the process's ``__main__``.

        Args:
            code: Source; common leading white space is removed.
            args: Strings or bytes, bound to the tuple ``args`` meanwhile.
        """
        if not isinstance(code, str):
            raise TypeError(f"code must be str, not {type(code).__name__}")
        process, channel = self._channel("eval")
        source = textwrap.dedent(code).encode("utf-8", "surrogatepass")
        if process.plain:
            strings = [source, *(_encode(a) for a in args)]
            channel.strings(_afork.CMD_EVAL, strings)
        else:
            _interpreter.update_path(process)
            tagged = [
                b"t" + _encode(a) if isinstance(a, str) else b"b" + _encode(a)
                for a in args
            ]
            channel.strings(_afork.CMD_EVAL_TYPED, [source, *tagged])
        process.flush()
        return self

    def require(self, *modules: str) -> Self:
        """Import modules, and bind them in ``__main__`` as ``import`` does."""
        for name in modules:
            if not isinstance(name, str):
                raise TypeError(f"module name must be str, not {type(name).__name__}")
            if not name:
                raise ValueError("empty module name")
        process, channel = self._channel("require")
        if not modules:
            return self
        if process.plain:
            from ._child import PERL_REQUIRE

            paths = [m.replace("::", "/").replace(".", "/").encode() for m in modules]
            channel.strings(_afork.CMD_EVAL, [PERL_REQUIRE, *paths])
        else:
            _interpreter.update_path(process)
            channel.strings(_afork.CMD_IMPORT, [m.encode() for m in modules])
        process.flush()
        return self

    def send_fh(self, *handles: HandleLike) -> Self:
        """Send descriptors, to be arguments of the function that is run.

        Each is duplicated at once, so the caller may close its own. A socket
        arrives as ``socket.socket``, a file, pipe or device as an unbuffered
        ``io.FileIO``, anything else as `afork.Handle`.

        Raises:
            TypeError: not a handle, or a TLS socket.
            ValueError: negative or closed, or more than 64 are pending.
            OSError: EBADF, or EMFILE when no descriptor is left.
        """
        process, channel = self._channel("send_fh")
        fds = [descriptor_of(handle) for handle in handles]
        if process.handles + len(fds) > _afork.HANDLES_MAX:
            raise ValueError(
                f"more than {_afork.HANDLES_MAX} descriptors pending in one process"
            )
        channel.handles(fds)  # all or none
        process.handles += len(fds)
        process.flush()
        return self

    def send_arg(self, *args: StrOrBytes) -> Self:
        """Send strings or bytes, to be arguments of the function that is run.

        Each arrives as it was sent.
        """
        process, channel = self._channel("send_arg")
        encoded = [(not process.plain and isinstance(a, str), _encode(a)) for a in args]
        for is_text, group in _groups(encoded):
            letter = _afork.CMD_TEXT if is_text else _afork.CMD_ARGS
            channel.strings(letter, group)
        process.flush()
        return self

    def set(
        self,
        *,
        env: Mapping[str, str | None] | None = None,
        cwd: str | bytes | os.PathLike[str] | None = None,
        umask: int | None = None,
        rlimits: Mapping[int, tuple[int, int]] | None = None,
        title: str | None = None,
        detach: bool | None = None,
    ) -> Self:
        """Change settings of the process; what it forks inherits them.

        Args:
            env: Environment variables to set, or (None) to remove.
            cwd: Working directory.
            umask: File mode creation mask.
            rlimits: ``resource.RLIMIT_*`` to (soft, hard), in the units of
                setrlimit(2).
            title: What ps shows, also after run.
            detach: Whether the process outlives the application.
        """
        process, channel = self._channel("set")
        if process.plain:
            raise AforkError("set needs a process in afork mode, this one is plain")
        pairs: list[bytes] = []
        for name, value in (env or {}).items():
            encoded = os.fsencode(name)
            if not encoded or b"=" in encoded or b"\0" in encoded:
                raise ValueError(f"illegal name of an environment variable: {name!r}")
            if value is None:
                pairs += [b"unsetenv", encoded]
            else:
                pairs += [b"env", encoded + b"=" + os.fsencode(value)]
        if cwd is not None:
            pairs += [b"cwd", os.fsencode(cwd)]
        if any(b"\0" in value for value in pairs):
            raise ValueError("embedded null byte in a setting")
        if umask is not None:
            pairs += [b"umask", b"%d" % umask]
        for which, (soft, hard) in (rlimits or {}).items():
            pairs += [b"rlimit", b"%d %d %d" % (which, soft, hard)]
        if title is not None:
            pairs += [b"title", title.encode()]
        if detach is not None:
            pairs += [b"detach", b"1" if detach else b"0"]
        if pairs:
            channel.strings(_afork.CMD_SET, pairs)
            process.flush()
        return self

    def freeze(self) -> Self:
        """Share all objects of a template with its workers, for good.

        To be called before its first fork. What is in it then becomes immortal
        (CPython 3.12): workers read it without copying it, and it is never
        finalised or freed. See "Sharing objects" in the manual.

        Raises, where the process is awaited:
            RemoteError: the process has forked already.
        """
        process, channel = self._channel("freeze")
        if process.plain:
            raise AforkError("freeze needs a process in afork mode, this one is plain")
        channel.strings(_afork.CMD_SET, [b"freeze", b""])
        process.flush()
        return self

    def spares(self, n: int) -> Self:
        """Keep up to n processes in advance, so that a start takes a message.

        They are forked while the process has nothing else to do, each with
        what has been configured by then; what is configured later replaces
        them. How many there are follows from how many are needed: between
        none and n.

        Args:
            n: At most so many, up to 64; 0 for none, which is the default.
        """
        process, channel = self._channel("spares")
        if process.plain:
            raise AforkError("spares need a process in afork mode, this one is plain")
        n = operator.index(n)
        if not 0 <= n <= _afork.SPARES_MAX:
            raise ValueError(f"spares must be 0 to {_afork.SPARES_MAX}: {n}")
        channel.frame(_afork.CMD_SPARES, n.to_bytes(4, sys.byteorder))
        process.forked = process.forked or n > 0  # it is their parent
        process.flush()
        return self

    async def ready(self, *, spares: bool = False) -> Self:
        """Wait until everything queued so far has run.

        In plain mode: until it has been sent, as there are no answers.

        Args:
            spares: Wait for as many spares as are wanted, too; no longer than
                until one cannot be made.

        Raises:
            RemoteError: code in the process raised.
            OSError: the process could not be forked.
            TemplateError: its template has died.
            WorkerLost: the process has died.
        """
        process = self._open("ready")
        if process.plain:
            await process.until(
                lambda: (
                    process.gone
                    or process.channel is None
                    or not process.channel.queued
                )
            )
            process.raise_error()
            return self
        token = next_id()
        if process.channel is not None:
            payload = token.to_bytes(8, sys.byteorder) + (b"\1" if spares else b"")
            process.channel.frame(_afork.CMD_READY, payload)
            process.flush()

        def is_done() -> bool:
            return (process.warm if spares else process.done) >= token

        await process.until(
            lambda: (
                is_done()
                or process.error is not None
                or (process.gone and process.released)
            )
        )
        process.raise_error()
        if not is_done():
            raise ClosedError("closed while ready was awaited")
        return self

    async def stats(self) -> dict[str, Any]:
        """What the process knows of itself: see the manual for the keys.

        Executed in its turn, like everything that is queued; also after an
        error.

        Raises:
            AforkError: a plain process.
            TemplateError, WorkerLost: the process has died.
        """
        process, channel = self._channel("stats")
        if process.plain:
            raise AforkError("stats need a process in afork mode, this one is plain")
        return await ask_stats(process, channel)

    # -- becoming something

    def run(
        self,
        func: str | Callable[..., object],
        callback: Callable[[socket.socket], object] | None = None,
    ) -> Run:
        """Enter a function in the process, with our socket and its arguments.

        Queued at the call; awaiting it is optional. Awaited, it gives our end
        of the socket, non-blocking, once the function is entered; cancelling
        the await kills the process. Never awaited, our end is closed as soon
        as the function is entered, and an error goes to the logger "afork".

        Args:
            func: ``"pkg.mod.func"``, ``"pkg.mod:func"``, a name in the
                process's ``__main__``, or an importable callable. May be
                ``async def``. Called with (socket, handles and strings in the
                order sent).
            callback: Called with our end of the socket on success.

        Raises:
            TypeError: a lambda, a closure, a bound method: nothing to import.
            ClosedError: after run, exec, to_fh or close.

        Raises when awaited:
            RemoteError: the function cannot be found, or something before it
                raised.
            OSError: the process could not be forked, or a descriptor lost.
            TemplateError: its template has died.
            WorkerLost: the process died before it entered the function.
        """
        process = self._open("run")
        name, needs_main = function_name(func, process.has_main)
        encoded = name.encode()
        if len(encoded) > _afork.FRAME_MAX:
            raise ValueError(f"frame over the cap of {_afork.FRAME_MAX} bytes")
        main = None
        if needs_main and not process.plain:
            main = _interpreter.main_module()
        # Whatever can be refused has been: from here on it is claimed.
        process = self._fresh_copy(process)
        process.claimed = "run"
        process.callback = callback
        channel = process.channel
        if channel is not None:
            if not process.plain:
                _interpreter.update_path(process)
                if main is not None:
                    channel.strings(_afork.CMD_SET, [b"main", main])
            channel.frame(_afork.CMD_RUN, encoded)
            process.flush()
        return Run(process)

    def rpc(
        self,
        func: str | Callable[..., object],
        *,
        init: str | Callable[..., object] | None = None,
        done: str | Callable[..., object] | None = None,
        on_event: Callable[[Event], object] | None = None,
        on_error: Callable[[BaseException], object] | None = None,
        on_destroy: Callable[[], object] | None = None,
        asynchronous: bool = False,
        codec: object = "pickle",
    ) -> Rpc:
        """Let the process answer calls of a function.

        Queued at the call, as `run` is.

        Args:
            func: An importable function or its name; ``async def`` if
                asynchronous.
            init: Function called in the process first, with its pending
                arguments.
            done: Function called in the process at its orderly end.
            on_event: Called with an `Event` for each `afork.rpc.event` of the
                process.
            on_error: Called with the error, once, if the process dies or does
                not start.
            on_destroy: Called when the process has ended.
            asynchronous: Whether calls run together on an event loop in the
                process, or one after the other.
            codec: "pickle", "json", "bytes", "cloudpickle", or an importable
                object with ``dumps`` and ``loads``.

        Raises:
            TypeError: a lambda, a closure: nothing to import.
            ClosedError: after run, exec, to_fh or close.
        """
        from .rpc._rpc import Rpc, Setup

        setup = Setup(
            func, init=init, done=done, asynchronous=asynchronous, codec=codec
        )
        return Rpc(
            self, setup, on_event=on_event, on_error=on_error, on_destroy=on_destroy
        )

    def exec(
        self,
        program: str | bytes | os.PathLike[str],
        *args: str | bytes | os.PathLike[str],
        stdin: Stream = None,
        stdout: Stream = None,
        stderr: Stream = None,
        env: Mapping[str, str] | None = None,
        cwd: str | bytes | os.PathLike[str] | None = None,
        fds: Mapping[int, HandleLike] | None = None,
    ) -> Exec:
        """Turn the process into a program.

        Queued at the call; awaiting it is optional. Awaited, it gives the
        other end of the second socket pair if a stream is `SOCKET`, else
        None, once the program runs; cancelling the await kills the process.
        Pending arguments do not reach the program.

        Args:
            program: Searched in the PATH of the program's environment unless
                it has a slash.
            args: Its arguments.
            stdin: None (the process's own), `DEVNULL`, `SOCKET`, or a handle.
            stdout: The same.
            stderr: The same, or `STDOUT`.
            env: Its whole environment; None for the process's own.
            cwd: Its working directory.
            fds: Further descriptors by the number they get.

        Raises when awaited:
            OSError: it cannot be executed; errno and ``filename`` say why.
        """
        process = self._open("exec")
        if process.plain:
            raise AforkError("exec needs a process in afork mode, this one is plain")
        request = Request(program, args, env=env, cwd=cwd)
        with request.streams(stdin, stdout, stderr, fds or {}):
            process = self._fresh_copy(process)
            if process.channel is not None:
                with hub().lock:
                    request.queue(process.channel, _afork.CMD_EXEC)
                    process.claimed = "exec"
                    process.flush()
            process.claimed = "exec"
        process.held = request.take_socket()
        return Exec(process)

    def _fresh_copy(self, process: Process) -> Process:
        """A process that has forked stays what it is, and reaps.

        It is the parent of its children, whose exit only it can report; what
        is asked for happens in one more fork of it.
        """
        if process.forked and not process.plain:
            copy = fork_process(process)
            process.release()
            self._process = process = copy
        return process

    async def to_fh(self, plain: bool = False) -> socket.socket:
        """Give the process away: its socket, for `new_from_fh` elsewhere.

        Args:
            plain: Turn reports off, for a peer that knows only the original's
                protocol.
        """
        import socket as socket_module

        process = self._open("to_fh")
        if plain and not process.plain:
            await self.ready()
            process = self._open("to_fh")
            if process.channel is not None:
                process.channel.strings(_afork.CMD_SET, [b"plain", b""])
                process.flush()
        await process.until(process.is_settled)
        process.raise_error()
        channel = process.channel
        if channel is None:
            raise WorkerLost("the process has died", process.pid, process.status)
        process.claimed = "to_fh"
        hub().unwatch(channel.fileno())
        process.channel = None
        sock = socket_module.socket(
            socket_module.AF_UNIX, socket_module.SOCK_STREAM, 0, channel.detach()
        )
        sock.setblocking(False)
        return sock

    # -- the process

    @property
    def pid(self) -> int | None:
        """Process id, or None until the process has reported its start."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, -N for signal N, or None while it runs or if unknown."""
        self._process.ask_parent()
        status = self._process.status
        return None if status is None else os.waitstatus_to_exitcode(status)

    @property
    def rusage(self) -> resource.struct_rusage | None:
        """What the process has used, once it was reaped; None if unknown."""
        self._process.ask_parent()
        usage = self._process.usage
        if usage is None:
            return None
        import resource

        times = (usage[0] + usage[1] / 1e6, usage[2] + usage[3] / 1e6)
        return resource.struct_rusage((*times, *usage[4:]))

    async def wait(self) -> int:
        """Wait for the process to end; its exit code, or -N for signal N.

        Raises:
            WorkerLost: it has ended, but nobody could learn its status.
            OSError: it could never be started.
        """
        process = self._process
        process.watch_exit()

        def over() -> bool:
            if not process.exited:
                process.watch_exit()  # the pidfd may have come meanwhile
            return process.exited or (process.error is not None and process.pid is None)

        await process.until(over)
        if isinstance(process.error, (WorkerLost, TemplateError)):
            process.told()  # this is how: by its status
        if process.status is not None:
            return os.waitstatus_to_exitcode(process.status)
        if process.pid is None:
            process.raise_error()
        raise WorkerLost("its exit status is not known", process.pid)

    def send_signal(self, signal: int) -> None:
        """Send a signal, as soon as the process has started.

        Raises:
            ProcessLookupError: it has ended.
            OSError: EINVAL, there is no such signal.
        """
        self._process.send_signal(int(signal))

    def terminate(self) -> None:
        """Send SIGTERM; before run or exec, `close`."""
        if self._process.claimed:
            self.send_signal(signal.SIGTERM)
        else:
            self.close()

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """End the process as soon as it has done what is queued.

        What dropping the last reference does, said aloud. After run or exec
        it does nothing: the process ends when its function or program does.
        """
        self._process.release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        if value is not None:
            self._process.kill()
        try:
            await self.wait()
        except (WorkerLost, OSError):
            if value is None:
                self._process.raise_error()
        except BaseException:
            self._process.kill()
            raise

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        process = getattr(self, "_process", None)
        # At the end of the interpreter the kernel closes everything anyway, and
        # the names of this module may have gone.
        if process is not None and not finalizing():
            process.drop()

    def __repr__(self) -> str:
        process = self._process
        process.ask_parent()
        if process.exited:
            state = f"exited {self.returncode}"
        elif process.error is not None:
            state = "failed"
        elif process.claimed:
            state = process.claimed
        elif process.released:
            state = "closed"
        else:
            state = "serving" if process.pid else "starting"
        return f"<afork.Fork pid={process.pid} {state}>"


def _encode(value: object) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise TypeError(f"str or bytes needed, not {type(value).__name__}")


def _groups(items: Iterable[tuple[bool, bytes]]) -> Iterable[tuple[bool, list[bytes]]]:
    """Neighbours of one kind, together."""
    import itertools

    for kind, group in itertools.groupby(items, key=lambda item: item[0]):
        yield kind, [data for _, data in group]
