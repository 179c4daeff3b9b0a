"""Pool: calls into a changing number of processes."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from afork._errors import ClosedError, WorkerLost
from afork.rpc._call import Event, encode_call
from afork.rpc._kinds import CALL, STREAM
from afork.rpc._options import find_variable
from afork.rpc._rpc import Function, Setup
from afork.rpc._stream import Stream

from ._core import Core, Counts, Settings, Sink, usable_cpus
from ._map import map_calls
from ._worker import PoolCall

if TYPE_CHECKING:
    from types import TracebackType

    from afork._fork import Fork


@dataclass(frozen=True, slots=True)
class CallOptions:
    """The options of the calls of one view; see `Pool.with_options`."""

    timeout: float | None = None
    kill_after: float = 1.0
    retries: int = 0
    retry_on: tuple[type[BaseException], ...] = (WorkerLost,)
    priority: int = 0
    on_event: Callable[[Event], object] | None = None
    capture: bool = False


_CALL_OPTIONS = frozenset(CallOptions.__slots__)


@dataclass(frozen=True, slots=True)
class PoolStats:
    """The state of a pool; see `Pool.stats`."""

    #: Process ids of all processes, those included that are about to end.
    pids: tuple[int, ...]
    #: Processes that are starting, have no call, have calls, are ending.
    starting: int
    idle: int
    busy: int
    leaving: int
    #: Calls that no process has been given yet, and that processes are at.
    waiting: int
    running: int
    #: What has happened so far.
    counts: Counts


def _timer_seconds(seconds: float) -> float | None:
    """What timers can do: neither zero, which is none, nor more than they hold."""
    return None if seconds == math.inf else min(max(seconds, 1e-6), 1e8)


class Calls:
    """What can be called: a `Pool`, or a view of one with other options."""

    _options: CallOptions

    def _pool(self) -> Pool:
        raise NotImplementedError

    def with_options(self, **options: Any) -> View:
        """A view of this pool whose calls have other options.

        Args:
            timeout: Seconds that a call may run, from its start in a process.
                Then TimeoutError is raised in the function, by SIGALRM, or
                by cancelling its task.
            kill_after: Seconds that it then has before its process is killed
                and the call raises TimeoutError (1).
            retries: How often a call that has failed is given to another
                process (0).
            retry_on: Exceptions after which a call is tried again;
                WorkerLost unless given.
            priority: Calls with a higher one are started first (0).
            on_event: Called with the events of these calls instead of the
                pool's.
            capture: Whether the result is an ``afork.Captured``: value,
                stdout and stderr. An exception, WorkerLost included, has it
                as ``captured``. Not in asynchronous pools.

        Raises:
            TypeError: there is no such option.
            ValueError: it cannot have this value.
        """
        from dataclasses import replace

        if not options.keys() <= _CALL_OPTIONS:
            unknown = ", ".join(sorted(options.keys() - _CALL_OPTIONS))
            raise TypeError(
                f"with_options() got an unexpected option: {unknown}. There are "
                f"{', '.join(CallOptions.__slots__)}"
            )
        if "retry_on" in options:
            kinds = options["retry_on"]
            options["retry_on"] = (kinds,) if isinstance(kinds, type) else tuple(kinds)
        timeout = options.get("timeout")
        if timeout is not None:
            if not timeout > 0:  # or not a number
                raise ValueError(f"timeout must be positive: {timeout}")
            options["timeout"] = _timer_seconds(timeout)
        new = replace(self._options, **options)
        if new.capture and self._pool()._setup.asynchronous:
            raise ValueError("capture needs a synchronous pool: one call at a time")
        return View(self._pool(), new)

    def __call__(self, *args: object, **kwargs: object) -> PoolCall:
        """Call the pool's own function; see `call`."""
        pool = self._pool()
        if pool._func is None:
            raise TypeError("the pool has no function of its own: use call(fn, ...)")
        return pool._submit(self._options, CALL, args, kwargs)

    def call(
        self, fn: Callable[..., object], /, *args: object, **kwargs: object
    ) -> PoolCall:
        """Call a function in a process of the pool; its answer is to be awaited.

        Args:
            fn: An importable function; of any kind if the codec is
                "cloudpickle".

        Raises:
            Exception: the function or its arguments cannot be encoded.
            ClosedError: the pool is closed.

        Raises when awaited:
            Exception: what the function has raised.
            WorkerLost: the process died while it ran the call.
            TimeoutError: it has run for too long.
        """
        pool = self._pool()
        return pool._submit(self._options, CALL, pool._with_fn(fn, args), kwargs)

    def stream(
        self, fn: Callable[..., object] | None, /, *args: object, **kwargs: object
    ) -> Stream:
        """Call a generator in a process; its items are to be read by ``async for``.

        Args:
            fn: An importable generator function; None for the pool's own.
        """
        pool = self._pool()
        if self._options.timeout is not None or self._options.retries:
            raise ValueError("a stream has neither timeout nor retries")
        if fn is not None:
            args = pool._with_fn(fn, args)
        call = pool._encode(self._options, STREAM, args, kwargs)
        stream = Stream(call, pool._setup.codec.decode)
        pool._open().submit(call)
        return stream

    def map(
        self,
        fn: Callable[..., object] | None,
        iterable: Iterable[Any] | AsyncIterable[Any],
        *,
        ordered: bool = True,
        limit: int | None = None,
    ) -> AsyncIterator[Any]:
        """Call a function with each item; the results are to be read.

        Leaving the loop early and closing the iterator cancels what is open.

        Args:
            fn: An importable function; None for the pool's own.
            iterable: Items, each the one argument of a call; read as needed.
            ordered: Whether results come in the order of the items, or as they
                are ready.
            limit: Calls that may be open at a time; None for twice what the
                pool can run at a time.
        """
        call = self.__call__ if fn is None else self.call
        first: tuple[Any, ...] = () if fn is None else (fn,)
        settings = self._pool()._settings
        if limit is None:
            limit = 2 * settings.max * settings.load
        if limit < 1:
            raise ValueError(f"limit must be positive: {limit}")
        return map_calls(lambda item: call(*first, item), iterable, ordered, limit)


class View(Calls):
    """A pool with other options for its calls."""

    def __init__(self, pool: Pool, options: CallOptions) -> None:
        self._of = pool
        self._options = options

    def _pool(self) -> Pool:
        return self._of

    def __repr__(self) -> str:
        return f"<view of {self._of!r}>"


class Pool(Calls):
    """A changing number of processes that serve calls.

    ::

        async with afork.Pool() as pool:
            print(await pool.call(math.factorial, 1000))

    Each process has one call at a time (``load``), further ones wait. A call
    that is cancelled or takes too long has its process killed, and no other. A
    process that dies is replaced; what it ran raises `WorkerLost`, what waited
    behind goes to another process.

    Bound to the event loop that it is first used in. Leaving ``async with``
    waits for the open calls, then no process is left. An object that is dropped
    lets its calls finish.

    Args:
        func: The function that calling the pool calls, or its name; None for
            any, by `call`.
        template: The process to fork from, for modules to be preloaded and
            arguments of ``init``; None for a new one. Not ended with the pool.
        idle: Processes that are to be ready though nothing is to be done.
        max: Most processes; None for as many as there are usable CPUs.
        load: Most calls that one process has at a time. More than one keeps it
            busy between short calls; an asynchronous one runs them together.
        start: Seconds between the starts of two processes while calls wait.
        stop: Seconds after which one idle process ends, down to ``idle``.
        asynchronous: Whether the function is ``async def``, and a process runs
            up to ``load`` calls at once on its event loop.
        init: Function called in each process first, with the template's
            pending arguments.
        initargs: Further arguments of ``init``.
        done: Function called in each process at its orderly end.
        codec: "pickle", "json", "bytes", "cloudpickle", or an importable object
            with ``dumps`` and ``loads``.
        max_calls: Calls after which a process is replaced.
        max_age: Seconds after which it is, once it has answered.
        max_rss: Bytes of resident memory above which it is.
        stdout: None for the template's, a function called with each line, or
            a descriptor.
        stderr: The same, or "tail": the application's own, the last of it
            kept for `WorkerLost`.
        logging: Whether records of the processes' logging are handled by the
            application's loggers.
        contextvars: Names ("pkg.mod:name") of context variables whose values
            calls take along.
        on_event: Called with an `Event` for each `afork.rpc.event`.
        on_error: Called with the error when a process has died or could not
            start.
        on_destroy: Called when the pool and its processes have ended.
    """

    def __init__(
        self,
        func: Function | None = None,
        *,
        template: Fork | None = None,
        idle: int = 0,
        max: int | None = None,
        load: int = 1,
        start: float = 0.0,
        stop: float = 10.0,
        asynchronous: bool = False,
        init: Function | None = None,
        initargs: tuple[object, ...] = (),
        done: Function | None = None,
        codec: object = "pickle",
        max_calls: int | None = None,
        max_age: float | None = None,
        max_rss: int | None = None,
        stdout: Sink | None = None,
        stderr: Sink | str | None = "tail",
        logging: bool = False,
        contextvars: Sequence[str] = (),
        on_event: Callable[[Event], object] | None = None,
        on_error: Callable[[BaseException], object] | None = None,
        on_destroy: Callable[[], object] | None = None,
    ) -> None:
        if max is None:
            max = usable_cpus()
        if max < 1 or load < 1 or not 0 <= idle <= max:
            raise ValueError("0 <= idle <= max, max >= 1 and load >= 1 are needed")
        if start < 0 or stop <= 0:
            raise ValueError("start must not be negative, stop must be positive")
        if isinstance(stderr, str) and stderr != "tail":
            raise ValueError(f'stderr must be None, "tail" or callable: {stderr!r}')
        self._setup = Setup(
            func,
            init=init,
            initargs=initargs,
            done=done,
            asynchronous=asynchronous,
            codec=codec,
        )
        self._func = func
        self._settings = Settings(
            idle=idle,
            max=max,
            load=load,
            start=start,
            stop=stop,
            max_calls=max_calls,
            max_age=max_age,
            max_rss=max_rss,
            stdout=stdout,
            stderr=stderr,
            logging=logging,
            on_event=on_event,
            on_error=on_error,
            on_destroy=on_destroy,
        )
        self._options = CallOptions()
        self._variables = {name: find_variable(name) for name in contextvars}
        if self._variables and not self._setup.codec.pickles:
            raise ValueError("contextvars need a codec that pickles")
        self._template = template
        self._core: Core | None = None
        self._closed = False

    def _pool(self) -> Pool:
        return self

    # -- calls

    def _open(self) -> Core:
        if self._closed:
            raise ClosedError("the pool is closed")
        return self._start()

    def _start(self) -> Core:
        core = self._core
        loop = asyncio.get_running_loop()
        if core is None:
            core = self._core = Core(loop, self._template, self._setup, self._settings)
        elif core.loop is not loop:
            raise RuntimeError(f"{self!r} belongs to another event loop")
        return core

    def _with_fn(
        self, fn: Callable[..., object], args: tuple[object, ...]
    ) -> tuple[object, ...]:
        if self._func is not None:
            raise TypeError("the pool has a function of its own: call the pool")
        if not callable(fn):
            raise TypeError(f"a function is needed, not {type(fn).__name__}")
        if getattr(fn, "__module__", None) in ("__main__", "__mp_main__"):
            self._open().template.need_main()
        return (fn, *args)

    def _encode(
        self,
        options: CallOptions,
        kind: int,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> PoolCall:
        core = self._open()
        call = encode_call(core.loop, self._setup.codec, kind, args, kwargs, PoolCall)
        assert isinstance(call, PoolCall)
        call.failed = False
        call.limit = options.timeout
        call.kill_after = options.kill_after
        call.priority = options.priority
        call.retries = options.retries
        call.retry_on = options.retry_on
        call.overdue = call.timer = None
        call.on_event = options.on_event
        if options.timeout is not None or options.capture or self._variables:
            call.options = self._call_options(options)
        return call

    def _call_options(self, options: CallOptions) -> list[bytes]:
        strings: list[bytes] = []
        if options.timeout is not None:
            strings += [b"timeout", repr(options.timeout).encode()]
        if options.capture:
            strings += [b"capture", b"1"]
        values = {}
        missing = object()
        for name, variable in self._variables.items():
            value = variable.get(missing)
            if value is not missing:
                values[name] = value
        if values:
            payload, fds = self._setup.codec.encode(values)
            if fds:
                from afork.rpc._codecs import close_all

                close_all(fds)
                raise ValueError("the values of context variables are too large")
            strings += [b"context", payload]
        return strings

    def _submit(
        self,
        options: CallOptions,
        kind: int,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> PoolCall:
        call = self._encode(options, kind, args, kwargs)
        assert self._core is not None
        self._core.submit(call)
        return call

    # -- the pool

    @property
    def template(self) -> Fork:
        """The process that all others are forked from, to be configured.

        Once it has been asked for, it is not replaced when it dies.
        """
        return self._start().template.hand_out()

    def stats(self) -> PoolStats:
        """What the pool is doing, and has done."""
        core = self._core
        if core is None:
            return PoolStats((), 0, 0, 0, 0, 0, 0, Counts())
        from dataclasses import replace

        everyone = [*core.workers, *core.leaving]
        busy = sum(1 for worker in core.workers if worker.calls)
        return PoolStats(
            pids=tuple(w.fork.pid for w in everyone if w.fork.pid is not None),
            starting=core.starting,
            idle=len(core.workers) - busy - core.starting,
            busy=busy,
            leaving=len(core.leaving),
            waiting=core.waiting,
            running=core.open - core.waiting,
            counts=replace(core.count),
        )

    async def drain(self) -> None:
        """Wait until every call has been answered."""
        if self._core is not None:
            await self._start().drain()

    async def close(self, timeout: float | None = None) -> None:
        """End the pool: no process is left afterwards.

        Args:
            timeout: Seconds to wait for the open calls; None for as long as
                they take. Then they are cancelled, and the processes killed.
                Cancelling this has the same effect at once.

        A stream of which nothing is read for a second, so that its generator
        waits, is ended. Output of processes has been written to its descriptor
        afterwards, unless that took nothing for a second.
        """
        core = self._start() if self._core is not None else None
        self._closed = True
        if core is not None:
            await core.close(timeout)

    async def __aenter__(self) -> Self:
        self._start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if value is not None and self._core is not None:
            self._closed = True
            self._core.closed = True
            self._core.cancel_all()
        await self.close()

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        core = getattr(self, "_core", None)
        if core is None or finalizing() or self._closed or core.loop.is_closed():
            return
        try:
            core.loop.call_soon_threadsafe(core.let_go)
        except RuntimeError:
            pass  # closed in another thread since

    def __repr__(self) -> str:
        core = self._core
        if core is None:
            return "<afork.Pool>"
        return (
            f"<afork.Pool processes={len(core.workers)} waiting={core.waiting} "
            f"open={core.open}>"
        )
