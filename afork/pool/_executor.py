"""Executor: a pool behind the interface of `concurrent.futures`."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import TYPE_CHECKING, Any, TypeVar

from ._pool import Pool

if TYPE_CHECKING:
    from afork._fork import Fork

    from ._worker import PoolCall

T = TypeVar("T")


class ExecutorFuture(futures.Future[T]):
    """The answer to a call; cancelling it ends a call that runs as well."""

    def __init__(self) -> None:
        super().__init__()
        self._call: PoolCall | None = None
        self._thread: _LoopThread | None = None

    def cancel(self) -> bool:
        """Cancel the call; its process is killed if it is running.

        Returns:
            False if it has ended already.
        """
        # It never enters the state RUNNING, in which nothing can be cancelled.
        if not super().cancel():
            return False
        thread = self._thread
        if thread is not None:
            thread.call(self._cancel_call)
        return True

    def _cancel_call(self) -> None:
        """In the thread of the loop."""
        if self._call is not None and not self._call.done():
            self._call.cancel()
        _notify_cancelled(self)

    def running(self) -> bool:
        """Whether a process is at it."""
        call = self._call
        return call is not None and not call.done() and call.connection is not None


def _notify_cancelled(future: futures.Future[Any]) -> None:
    """Tell those who wait for several futures, once; in the loop's thread."""
    # The state has no public name; the standard executors look at it, too.
    if future._state == "CANCELLED":
        future.set_running_or_notify_cancel()


class _LoopThread:
    """An event loop in a thread of its own, with a pool on it."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.loop = asyncio.new_event_loop()
        self.closing = False
        self.stop_now = asyncio.Event()
        self.cancel = False
        started = threading.Event()
        self.thread = threading.Thread(
            target=self._run, args=(started,), name="afork executor", daemon=True
        )
        self.thread.start()
        started.wait()

    def _run(self, started: threading.Event) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._main(started))

    async def _main(self, started: threading.Event) -> None:
        async with self.pool:
            started.set()
            await self.stop_now.wait()
            if self.cancel:
                core = self.pool._core
                assert core is not None
                for _, _, call in list(core._heap):
                    call.cancel()

    def call(self, callback: Callable[..., object], *args: object) -> None:
        """Call in the thread of the loop; not at all once that has ended."""
        try:
            self.loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            pass

    def stop(self, cancel: bool) -> None:
        self.cancel = self.cancel or cancel
        self.closing = True
        self.call(self.stop_now.set)


class Executor(futures.Executor):
    """A `concurrent.futures.Executor` whose calls run in processes of a `Pool`.

    For libraries that take an executor, for ``loop.run_in_executor``, and for
    programs without asyncio. Cancelling a future ends its call although it
    runs; a process that dies fails its own call with `WorkerLost` and the
    executor goes on.

    Args:
        max_workers: Most processes; None for as many as there are usable CPUs.
        template: As of `Pool`.
        initializer: Function called in each process first.
        initargs: Its arguments.
        options: Further arguments of `Pool`.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        template: Fork | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[object, ...] = (),
        **options: Any,
    ) -> None:
        if max_workers is not None and max_workers < 1:
            raise ValueError(f"max_workers must be positive: {max_workers}")
        if initializer is not None:
            if "init" in options:
                raise TypeError("initializer and init exclude each other")
            options["init"] = initializer
            options["initargs"] = initargs
        elif initargs:
            raise TypeError("initargs without an initializer")
        self._pool = Pool(template=template, max=max_workers, **options)
        self._lock = threading.Lock()
        self._shut_down = False
        self._thread: _LoopThread | None = None

    def _start(self) -> _LoopThread:
        with self._lock:
            if self._shut_down:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if self._thread is None:
                self._thread = thread = _LoopThread(self._pool)
                _threads.add(thread)
                weakref.finalize(self, thread.stop, False)
            return self._thread

    def submit(
        self, fn: Callable[..., T], /, *args: Any, **kwargs: Any
    ) -> futures.Future[T]:
        """Call a function in a process.

        Raises:
            RuntimeError: after `shutdown`.
        """
        thread = self._start()
        future: ExecutorFuture[T] = ExecutorFuture()
        future._thread = thread

        def start() -> None:
            if future.cancelled():
                _notify_cancelled(future)
                return
            try:
                call = self_pool.call(fn, *args, **kwargs)
            except BaseException as exc:
                _finish(future, None, exc)
                return
            future._call = call
            call.add_done_callback(ended)

        def ended(call: asyncio.Future[Any]) -> None:
            if call.cancelled():
                future.cancel()
                _notify_cancelled(future)
            elif (error := call.exception()) is not None:
                _finish(future, None, error)
            else:
                _finish(future, call.result(), None)

        self_pool = self._pool
        thread.call(start)
        return future

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        **options: Any,
    ) -> Iterator[T]:
        """Call a function with each item, or with the items of each chunk at once.

        See `concurrent.futures.Executor.map`.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if chunksize == 1:
            return super().map(fn, *iterables, timeout=timeout, **options)
        chunks = _chunks(zip(*iterables, strict=False), chunksize)
        results = super().map(
            _call_each, _repeat(fn), chunks, timeout=timeout, **options
        )
        return _chain(results)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no further calls; end the processes once the open ones are done.

        Args:
            wait: Whether to return only when no process is left.
            cancel_futures: Whether calls that no process has yet are cancelled.
        """
        with self._lock:
            self._shut_down = True
            thread = self._thread
        if thread is not None:
            thread.stop(cancel_futures)
            if wait:
                thread.thread.join()


def _finish(
    future: futures.Future[Any], value: Any, error: BaseException | None
) -> None:
    try:
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)
    except futures.InvalidStateError:
        _notify_cancelled(future)  # cancelled at the same moment


def _call_each(fn: Callable[..., T], chunk: list[tuple[Any, ...]]) -> list[T]:
    return [fn(*args) for args in chunk]


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    from itertools import islice

    while chunk := list(islice(items, size)):
        yield chunk


def _repeat(value: T) -> Iterator[T]:
    while True:
        yield value


def _chain(results: Iterator[list[T]]) -> Iterator[T]:
    for chunk in results:
        chunk.reverse()
        while chunk:
            yield chunk.pop()


#: Threads that the end of the interpreter waits for.
_threads: weakref.WeakSet[_LoopThread] = weakref.WeakSet()


def _at_exit() -> None:
    """As the executors of the standard library: open calls are finished."""
    for thread in list(_threads):
        thread.stop(False)
    for thread in list(_threads):
        thread.thread.join()


threading._register_atexit(_at_exit)  # type: ignore[attr-defined]
