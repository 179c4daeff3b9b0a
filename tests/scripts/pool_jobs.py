"""What the tests of pools call: imported by the tests and by the processes."""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading

import afork.rpc

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")

#: What init was called with.
state: list[object] = []


# -- answers


def add(a, b=0):
    return a + b


def pid(*_):
    return os.getpid()


def echo(*args, **kwargs):
    return args, kwargs


def fail(kind=ValueError, *args):
    raise kind(*args)


def count(n):
    yield from range(n)


def count_and_fail(n):
    yield from range(n)
    raise ValueError(n)


def forever(log):
    """A generator that says when it is closed."""
    try:
        n = 0
        while True:
            yield n
            n += 1
    finally:
        note(log, "closed")


async def forever_async(log):
    try:
        n = 0
        while True:
            yield n
            n += 1
    finally:
        note(log, "closed")


def progress(n):
    for i in range(n):
        afork.rpc.event("progress", i)
    return n


def write(text):
    os.write(1, f"{text} out\n".encode())
    os.write(2, f"{text} err\n".encode())
    return text


def get_variable():
    return variable.get("unset")


def get_state():
    return state


def note(path, text):
    """One line, as a whole, however many processes write."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, f"{text}\n".encode())
    os.close(fd)


def note_and_add(path, a, *_):
    note(path, a)
    return a + 1


def retire():
    afork.rpc.retire()
    return os.getpid()


# -- waiting


def hold(gate, value=None):
    """Say that it runs, and wait to be let go: a byte in a FIFO."""
    fd = os.open(gate, os.O_RDONLY)
    try:
        afork.rpc.event("held", os.getpid(), value)
        os.read(fd, 1)
    finally:
        os.close(fd)
    return value


def hold_and_crash(gate, how):
    hold(gate)
    crash(how)


def hold_twice(gate):
    hold(gate)
    return hold(gate)


def note_and_hold(path, gate):
    note(path, "begun")
    return hold(gate)


def hold_through(gate):
    """The same, but an exception does not end it."""
    while True:
        try:
            return hold(gate)
        except Exception:
            afork.rpc.event("swallowed")


def hold_blocking(gate):
    """The same, and no signal with a handler reaches it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    return hold(gate)


def hold_catching(gate):
    try:
        hold(gate)
    except TimeoutError:
        return "caught"


def hold_stream(gate, n=1):
    """A generator that waits between its items."""
    for i in range(n):
        hold(gate, i)
        yield i


async def wait(value=None):
    afork.rpc.event("held", os.getpid(), value)
    await asyncio.Event().wait()


async def wait_through():
    while True:
        try:
            await wait()
        except asyncio.CancelledError:
            afork.rpc.event("swallowed")


class Meeting:
    """Calls that wait for each other."""

    waiting: list[asyncio.Event]

    def __init__(self):
        self.waiting = []


meeting = Meeting()


async def meet(n):
    """Return once n calls are here at the same time."""
    here = asyncio.Event()
    meeting.waiting.append(here)
    if len(meeting.waiting) == n:
        for other in meeting.waiting:
            other.set()
    await here.wait()
    return os.getpid()


async def add_async(a, b=0):
    return a + b


async def apply(what, *args):
    """One function for all that an asynchronous pool is asked."""
    return await globals()[what](*args)


# -- init and done


def init(*args):
    state.extend(args)


def init_fail(*args):
    raise LookupError("no init today")


def init_note(path, *args):
    note(path, f"init {os.getpid()}")


def init_note_fail(path, *args):
    note(path, "init")
    raise LookupError("no init today")


def init_hold(gate):
    fd = os.open(gate, os.O_RDONLY)
    os.read(fd, 1)
    os.close(fd)


def init_done(path):
    state.append(path)


def done():
    note(state[0], f"done {os.getpid()}")


def grow(n):
    """Memory that stays."""
    state.append(bytearray(os.urandom(1024)) * (n // 1024))
    return os.getpid()


# -- ways to die


def overflow():
    """The stack of C code, before the interpreter's own limits."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(resource.RLIMIT_STACK, (64 << 10, hard))
    sys.setrecursionlimit(1 << 20)

    def deeper(n):
        return max([n], key=lambda x: deeper(x - 1)) if n else 0

    deeper(900)
    raise RecursionError


def crash(how):
    if how == "raise":
        raise ValueError("raised")
    if how == "sys.exit":
        sys.exit(3)
    if how == "os._exit":
        os._exit(3)
    if how == "SIGSEGV":
        ctypes.string_at(0)
    if how == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "overflow":
        overflow()
    if how == "memory":
        import resource

        limit = 64 << 20
        with open("/proc/self/statm") as file:
            limit += int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_AS, (limit, -1))
        try:
            bytearray(1 << 40)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    raise AssertionError(how)


class CrashOnLoad:
    """An argument that cannot be decoded."""

    def __init__(self, how):
        self.how = how

    def __reduce__(self):
        return crash, (self.how,)


class CrashOnDump:
    """A result that cannot be encoded."""

    def __init__(self, how):
        self.how = how

    def __reduce__(self):
        crash(self.how)
        return str, ()


def make_result(how):
    return CrashOnDump(how)


def crash_later(how, gate):
    """Return, then crash in a thread once the gate is opened."""

    def work():
        fd = os.open(gate, os.O_RDONLY)
        os.read(fd, 1)
        os.close(fd)
        try:
            crash(how)
        except RecursionError:  # newer ones know the size of a thread's stack
            os.kill(os.getpid(), signal.SIGSEGV)

    threading.stack_size(128 << 10)  # enough for all but one
    threading.Thread(target=work, daemon=True).start()
    return os.getpid()


def call_any(fn, *args):
    """For those that are bound to one function."""
    return fn(*args)


def crash_bytes(how):
    """Init with an argument that the template had."""
    crash(how if isinstance(how, str) else how.decode())


def socket_of_server():
    """The descriptor that this process answers on."""
    return afork.rpc._server.link.fileno()


def garbage(data):
    """Write to the socket instead of answering, and stay."""
    os.write(socket_of_server(), data)
    signal.pause()


def close_socket():
    """Answer no more, and stay."""
    os.close(socket_of_server())
    signal.pause()


def frame(kind, id, payload):
    """A frame with this payload, whatever it means."""
    server = afork.rpc._server
    server.link.send(kind, id or server.call_id(), payload)
    server.link.flush(True)
    signal.pause()


def fork_and_die():
    """Die, but leave a process that has our socket open."""
    child = os.fork()
    if not child:
        signal.pause()
    afork.rpc.event("child", child)
    os.kill(os.getpid(), signal.SIGKILL)


async def nested(n):
    """A pool inside a worker."""
    async with afork.Pool(max=2) as pool:
        return [x async for x in pool.map(add, range(n))]


def run_nested(n):
    return asyncio.run(nested(n))


def note_and_crash(path, how, *_):
    note(path, how)
    crash(how)


async def note_and_crash_async(path, how, *_):
    note(path, how)
    crash(how)


def crash_at_first(path):
    """Works the second time."""
    note(path, "x")
    with open(path) as file:
        n = len(file.read().split())
    if n == 1:
        crash("SIGKILL")
    return n


def init_once(path):
    """Works the first time."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL))


def stay(how):
    """Refuse to end when asked to."""
    if how == "term":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    if how == "thread":
        threading.Thread(target=threading.Event().wait).start()
    if how == "exit":
        import atexit

        atexit.register(threading.Event().wait)
    return os.getpid()


def named(call):
    """One function for several kinds of items."""
    name, *args = call
    return globals()[name](*args)


def hold_pair(pair):
    return hold(*pair)


def raise_it(error):
    raise error


def noted(path, number, kind, gate=None):
    """Note that it runs, then do one of many things."""
    note(path, number)
    if kind == "hold":
        hold(gate)
    elif kind == "fail":
        raise ValueError(number)
    elif kind == "crash":
        crash("SIGKILL")
    elif kind == "exit":
        crash("os._exit")
    elif kind == "stream":
        return iter([number, 1, 2])
    return number


# -- output


def write_and_crash(how, size=0):
    """Write in all ways there are, then die."""
    os.write(1, b"x" * size + b"\n" * bool(size))
    print("python")
    os.write(1, b"write\n")
    subprocess.run("echo program; echo error >&2", shell=True)
    os.write(2, b"unfinished")
    if how == "exec":
        os.execv("/bin/true", ["true"])
    crash(how)


def write_and_return(how):
    write(how)
    return CrashOnDump(how)


def write_and_crash_at_first(path):
    note(path, "x")
    with open(path) as file:
        n = len(file.read().split())
    print("attempt", n)
    if n == 1:
        crash("SIGKILL")
    return n


def write_and_block(gate):
    print("so far")
    hold_blocking(gate)


def write_items_and_crash(n):
    for i in range(n):
        print(i)
        yield i
    crash("SIGSEGV")


def write_and_check():
    print("function")
    subprocess.run("echo program; exit 3", shell=True, check=True, stdout=-1)


def leave_program(gate):
    """A program that writes once more when it is let go, and ends."""
    print("first", flush=True)
    state.append(subprocess.Popen(["sh", "-c", 'read x <"$0"; echo late', gate]))


def free_program_and_crash(gate):
    fd = os.open(gate, os.O_WRONLY)
    os.write(fd, b"\n")
    os.close(fd)
    state[-1].wait()
    print("second")
    crash("SIGKILL")


def fork_return_and_crash():
    child = os.fork()
    if not child:
        print("child")
        return
    os.waitpid(child, 0)
    print("parent")
    crash("SIGKILL")


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def _sockets():
    """All but the one of the server."""
    for name in os.listdir("/proc/self/fd"):
        try:
            mode = os.fstat(int(name)).st_mode
            others = 0, 1, 2, socket_of_server()
            if stat.S_ISSOCK(mode) and int(name) not in others:
                yield int(name)
        except OSError:  # the one that listed them
            pass


def close_sockets():
    for fd in list(_sockets()):
        os.close(fd)


def keep_other_things(what):
    """Put something else in the place of the files of this call."""
    store = afork.rpc._server.store
    store.clear()
    name = struct.pack("=Q", afork.rpc.call_id())
    if what == "pipe":
        fds = os.pipe()
    elif what == "file":
        fds = [os.open("/proc/self/status", os.O_RDONLY)] * 2
    elif what == "nothing":
        fds = []
    elif what == "one":
        fds = [os.memfd_create("x")]
    elif what == "text":
        name, fds = b"?", [os.memfd_create("x")] * 2
    else:
        fds = [os.memfd_create("x")] * 100
    socket.send_fds(store.sender, [name], fds)
    crash("SIGKILL")
