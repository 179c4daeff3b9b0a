"""Functions that tests call in other processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time

import afork.rpc

state: list[object] = []


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
