"""Executor: a pool behind the interface of `concurrent.futures`."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from ._pool import Pool

if TYPE_CHECKING:
    from types import TracebackType

    from afork._fork import Fork

    from ._worker import PoolCall

T = TypeVar("T")

logger = logging.getLogger("afork")


class ExecutorFuture(futures.Future[T]):
    """The answer to a call; cancelling it ends a call that runs as well."""

    def __init__(self, thread: _LoopThread) -> None:
        super().__init__()
        self._thread: _LoopThread | None = thread
        self._call: PoolCall | None = None

    def cancel(self) -> bool:
        """Cancel the call; its process is killed if it is running.

        Returns:
            False if it has ended already.
        """
        thread = self._thread
        try:
            # It never enters the state RUNNING, in which nothing can be cancelled.
            return super().cancel()
        finally:  # though a callback has raised SystemExit
            if self.cancelled():
                self._notify_cancelled()
                if thread is not None:
                    thread.call(self._cancel_call)

    def _notify_cancelled(self) -> None:
        """Wake those who wait for several futures.

        Here, by whoever cancels: the loop's thread may be busy. The names are
        private, but the standard library's own executors and wait() live by them.
        """
        with self._condition:
            if self._state == "CANCELLED":
                self.set_running_or_notify_cancel()

    def _cancel_call(self) -> None:
        """In the thread of the loop."""
        if self._call is not None:
            self._call.cancel()

    def running(self) -> bool:
        """Whether a process is at it."""
        call = self._call
        return call is not None and call.connection is not None and not self.done()

    def _settle(self, how: Callable[..., object], *args: object) -> None:
        """In the thread of the loop."""
        try:
            how(*args)
        except futures.InvalidStateError:
            pass  # cancelled at the same moment
        except BaseException:
            # SystemExit of a callback must not end the calls of all others.
            logger.exception("a callback of %r has raised", self)

    def _ended(self, call: asyncio.Future[Any]) -> None:
        """In the thread of the loop: there is an answer."""
        thread, self._thread, self._call = self._thread, None, None
        if thread is not None:
            thread.open.discard(self)
        if call.cancelled():
            self._settle(self.cancel)
        elif (error := call.exception()) is not None:
            self._settle(self.set_exception, error)
        else:
            self._settle(self.set_result, call.result())


class _LoopThread:
    """An event loop in a thread of its own, with a pool on it."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.pid = os.getpid()
        # Not the policy's: that may know loops of the main thread only.
        self.loop = asyncio.SelectorEventLoop()
        #: Nothing is to be submitted any more; changed under _lock.
        self.closing = False
        self.stop_now = asyncio.Event()
        #: Futures without an answer.
        self.open: set[ExecutorFuture[Any]] = set()
        self.thread = threading.Thread(
            target=self._run, name="afork executor", daemon=True
        )

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
                runner.run(self._main())
        except BaseException:  # SystemExit in a callback of the user's, say
            logger.exception("the thread of an executor has ended")
        finally:
            with _lock:
                self.closing = True
                left = list(self.open)
            for future in left:
                future.cancel()

    async def _main(self) -> None:
        try:
            await self.stop_now.wait()
        except asyncio.CancelledError:
            await self.pool.close(0)
            raise
        await self.pool.close()

    def call(self, callback: Callable[..., object], *args: object) -> None:
        """Call in the thread of the loop; not at all once that has ended."""
        if self.pid != os.getpid():
            return  # the loop's wake-up descriptor is the parent's
        try:
            self.loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            pass

    def submit(
        self,
        future: ExecutorFuture[Any],
        fn: Callable[..., object],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Under _lock."""
        self.open.add(future)
        self.call(self._begin, future, fn, args, kwargs)

    def _begin(
        self,
        future: ExecutorFuture[Any],
        fn: Callable[..., object],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if future.cancelled():
            self.open.discard(future)
            return
        try:
            call = self.pool.call(fn, *args, **kwargs)
        except BaseException as exc:
            self.open.discard(future)
            future._settle(future.set_exception, exc)
            return
        future._call = call
        call.add_done_callback(future._ended)

    def stop(self, cancel: bool) -> None:
        """Take nothing more, and end once all is answered."""
        with _lock:
            self.closing = True
        if cancel:
            self.call(self._cancel_waiting)
        self.let_go()

    def let_go(self) -> None:
        # Without the lock: this may be the garbage collector, anywhere.
        self.call(self.stop_now.set)

    def _cancel_waiting(self) -> None:
        core = self.pool._core
        if core is not None:
            for _, _, call in list(core._heap):
                call.cancel()

    def join(self) -> None:
        """Wait for the end, unless in a callback that it waits for itself."""
        if threading.current_thread() is not self.thread:
            self.thread.join()


class Executor(futures.Executor):
    """A `concurrent.futures.Executor` whose calls run in processes of a `Pool`.

    For libraries that take an executor, for ``loop.run_in_executor``, and for
    programs without asyncio. Cancelling a future ends its call although it
    runs; a process that dies fails its own call with `WorkerLost` and the
    executor goes on.

    Args:
        max_workers: Most processes; None for as many as there are usable CPUs.
        template: As of `Pool`.
        initializer: Function called in each process first. What it raises is
            raised by the calls that wait; later calls try again.
        initargs: Its arguments.
        options: Further arguments of `Pool`. Callbacks among them are called in
            the executor's thread.
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
        if "func" in options:
            raise TypeError("func is an option of Pool only")
        if initializer is not None:
            if "init" in options:
                raise TypeError("initializer and init exclude each other")
            options["init"] = initializer
            options["initargs"] = initargs
        elif initargs:
            raise TypeError("initargs without an initializer")
        self._pool = Pool(template=template, max=max_workers, **options)
        self._shut_down = False
        self._thread: _LoopThread | None = None

    def _start(self) -> _LoopThread:
        """Under _lock."""
        if self._shut_down:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if _exiting:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        thread = self._thread
        if thread is None:
            # Known before it starts: an interrupt may come while it does.
            self._thread = thread = _LoopThread(self._pool)
            try:
                thread.thread.start()
            except RuntimeError:  # no thread left, or the interpreter is ending
                self._thread = None
                thread.loop.close()
                raise
            _threads.add(thread)
            weakref.finalize(self, thread.let_go).atexit = False
        elif thread.pid != os.getpid():
            raise RuntimeError("the executor belongs to the parent of this process")
        elif thread.closing:
            raise RuntimeError("the thread of the executor has ended")
        return thread

    def submit(
        self, fn: Callable[..., T], /, *args: Any, **kwargs: Any
    ) -> futures.Future[T]:
        """Call a function in a process.

        Raises:
            RuntimeError: after `shutdown`.
        """
        with _lock:
            thread = self._start()
            future: ExecutorFuture[T] = ExecutorFuture(thread)
            thread.submit(future, fn, args, kwargs)
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

        See `concurrent.futures.Executor.map`. What is still open when the
        iterator is closed, or has raised, is cancelled, although it runs.
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
            wait: Whether to return only when no process is left; in a callback
                of the executor, this returns at once.
            cancel_futures: Whether calls that no process has yet are cancelled.
        """
        with _lock:
            self._shut_down = True
            thread = self._thread
        if thread is not None:
            thread.stop(cancel_futures)
            if wait:
                thread.join()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        # Ctrl-C does not reach the processes, which have sessions of their own:
        # without this, it would have no effect before the calls that run end.
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self.shutdown(wait=False)
            if self._thread is not None:
                for future in list(self._thread.open):
                    future.cancel()
        return super().__exit__(kind, value, traceback)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an executor cannot be pickled")


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


#: Held while something is submitted, and while it is decided that nothing is any
#: more. Signal handlers may submit as well, hence it can be taken twice.
_lock = threading.RLock()

#: Threads that the end of the interpreter waits for.
_threads: weakref.WeakSet[_LoopThread] = weakref.WeakSet()

#: The interpreter is ending.
_exiting = False


def _at_exit() -> None:
    """As the executors of the standard library: open calls are finished."""
    global _exiting
    with _lock:
        _exiting = True
        threads = list(_threads)
    for thread in threads:
        thread.stop(False)
    for thread in threads:
        thread.join()


def _forked() -> None:
    """In a child of the application: the threads are in the parent."""
    _threads.clear()
    _lock.release()


# The standard library's executors do it this way, too: it is before other
# threads are joined, which may wait until they are refused further calls.
# Should the private name go: at atexit those have ended, but ours is a daemon.
getattr(threading, "_register_atexit", atexit.register)(_at_exit)

# No child must find the lock held by a thread that it does not have.
os.register_at_fork(
    before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forked
)
