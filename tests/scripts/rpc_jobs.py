"""Functions that tests call in other processes."""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import logging
import os
import signal
import sys
import threading
import time
import warnings

import afork.rpc

state: list[object] = []

variable: contextvars.ContextVar[str] = contextvars.ContextVar(
    "variable", default="unset"
)


def echo(*args, **kwargs):
    return (args, kwargs) if kwargs else args


def double(x):
    return 2 * x


def remember(x):
    """Appends, and says what was there before."""
    state.append(x)
    return list(state)


def setup(*args):
    state.append(args)


def setup_fails(*args):
    raise LookupError("setup", len(args))


def what_state():
    return state


def block(fd_path):
    """Ends when somebody has opened the pipe for writing, and closed it."""
    with open(fd_path, "rb") as file:
        return file.read()


def forever():
    while True:
        signal.pause()


def fail(kind, *args):
    raise getattr(__import__("builtins"), kind)(*args)


def fail_with_cause():
    try:
        {}["missing"]
    except KeyError as exc:
        error = ValueError("caused")
        error.add_note("a note")
        raise error from exc


def die(how):
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), getattr(signal, how))
    signal.pause()


def say_and_die(text):
    print(text, file=sys.stderr)
    os._exit(1)


def unpicklable():
    return lambda: None


def events(n):
    for i in range(n):
        afork.rpc.event("step", i)
    return afork.rpc.call_id()


def event_unpicklable():
    afork.rpc.event(lambda: None)


def count_up(n, *, fail_at=None):
    try:
        for i in range(n):
            if i == fail_at:
                raise ArithmeticError(i)
            afork.rpc.event("made", i)
            yield i
    finally:
        afork.rpc.event("closed")


def say_done():
    with open(os.environ["RPC_JOBS_DONE"], "a") as file:
        file.write("done\n")


async def async_double(x):
    await asyncio.sleep(0)
    return 2 * x


_gates: dict[str, asyncio.Event] = {}


async def gate(name, action):
    """Waits at a gate, or opens it: calls that run at the same time."""
    event = _gates.setdefault(name, asyncio.Event())
    if action == "open":
        event.set()
    else:
        await event.wait()
    return action


async def async_cancelled():
    try:
        afork.rpc.event("begun")
        await asyncio.Event().wait()
    finally:
        afork.rpc.event("cancelled")


async def async_count_up(n):
    try:
        for i in range(n):
            afork.rpc.event("made", i)
            yield i
    finally:
        afork.rpc.event("closed")


async def async_events(n):
    for i in range(n):
        afork.rpc.event("step", i)
    afork.rpc.flush()
    await asyncio.sleep(0)
    return afork.rpc.call_id()


async def async_event_and_die():
    afork.rpc.event("last words")
    afork.rpc.flush()
    os._exit(0)


async def async_setup(*args):
    await asyncio.sleep(0)
    state.append(args)


async def async_state():
    return state


def busy(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


class Reversed:
    """A codec of the user's: text, backwards."""

    @staticmethod
    def dumps(value):
        return repr(value)[::-1]

    @staticmethod
    def loads(data):
        import ast

        return ast.literal_eval(bytes(data).decode()[::-1])


# -- faults


async def left_over():
    """What calls that have ended should not leave: options and descriptors."""
    server = afork.rpc._server
    return len(server.options), len(server.waiting), len(os.listdir("/proc/self/fd"))


class Unloadable:
    """Raises something when it is unpickled."""

    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        return throw, (self.error,)


def throw(error):
    raise error


async def give(value, error=None):
    return value if error is None else Unloadable(error())


async def unloadable_event(value):
    afork.rpc.event(Unloadable(ValueError("event")))
    afork.rpc.event("good")
    return value


async def answer_and_die(n, last, gate):
    """The last one leaves a process behind that has the socket and waits."""
    if n == last:
        for _ in range(3):  # the others have been answered
            await asyncio.sleep(0)
        afork.rpc.flush()
        fd = os.open(gate, os.O_RDONLY)  # here: later, the test may be over
        if os.fork() == 0:
            os.read(fd, 1)
        os._exit(0)
    return n


def _fork(how):
    """How a forked child ends up, whose status the parent returns."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it may complain
    if how == "exit":
        sys.exit(7)
    if how == "raise":
        raise ValueError("in the child")
    return "child"


def fork(how):
    return _fork(how)


async def async_fork(how):
    return _fork(how)


def fork_in_generator(how):
    yield "before"
    status = _fork(how)
    if status != "child" or how == "yield":
        yield status


async def async_fork_in_generator(how):
    yield "before"
    status = _fork(how)
    if status != "child" or how == "yield":
        yield status
    await asyncio.sleep(0)  # the child's loop goes on, with what is to be sent


async def async_fork_and_wait(how):
    """The child's loop goes on, with an event that both would send."""
    afork.rpc.event("before")
    status = _fork(how)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return status


def variables(n):
    for _ in range(n):
        yield variable.get()


async def async_variables(n):
    for _ in range(n):
        yield variable.get()


def one_and_wait():
    yield 1
    forever()


def large_items(n, size):
    for _ in range(n):
        yield b"x" * size


_opened = threading.Event()


async def event_of_a_thread(action):
    if action == "open":
        _opened.set()
        return None

    def work():
        afork.rpc.event("from a thread")
        return _opened.wait(10)

    return await asyncio.to_thread(work)


def log(name):
    logger = logging.getLogger(name)
    logger.debug("to be seen")
    other = logging.getLogger(f"{name}_other")
    other.debug("not to be seen")
    return logger.isEnabledFor(logging.DEBUG), other.isEnabledFor(logging.DEBUG)


def printf(text):
    """Output of C code, which stays in its buffer."""
    ctypes.CDLL(None).printf(b"%s", text)


def warnings_of_fork():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if (pid := os.fork()) == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    with open("/proc/self/comm") as file:
        return [str(w.message) for w in seen], file.read().rstrip("\n")


class TellsItsEnd:
    """An argument that says when the process has let go of it."""

    def __init__(self, data):
        self.data = data

    def __del__(self):
        if afork.rpc._server is not None:
            afork.rpc.event("freed")


def size(thing):
    return len(thing.data)
