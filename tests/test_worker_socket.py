"""The socket of a worker that has not loaded the module `socket`."""

from __future__ import annotations

import asyncio
import signal
import socket

import pytest

import afork
from afork import _afork, _worker_socket

from .conftest import read_all
from .scripts.api_ask import ask

LOADED = "'socket' in sys.modules"


def pair() -> tuple[_worker_socket.socket, socket.socket]:
    a, b = socket.socketpair()
    return blank_with(a.detach()), b


def blank_with(fd: int) -> _worker_socket.socket:
    """As run fills it in; a received one would be the whole thing at once."""
    sock = _worker_socket.blank()
    super(_worker_socket.socket, sock).__init__(-1, -1, -1, fd)
    return sock


def test_sending_and_receiving_load_nothing(arun):
    async def main():
        f = afork.Fork.new().eval(
            """
import sys
def talk(sock):
    with sock:
        sock.sendall(sock.recv(9) + repr((type(sock).__name__, 'socket' in sys.modules)).encode())
"""
        )
        sock = await f.run("talk")
        await asyncio.get_running_loop().sock_sendall(sock, b"hello")
        assert await read_all(sock) == b"hello('socket', False)"

    arun(main)


@pytest.mark.parametrize(
    "what",
    [
        "isinstance(sock, __import__('socket').socket)",
        "sock.family.name == 'AF_UNIX' and type(sock) is __import__('socket').socket",
        "sock.type.name == 'SOCK_STREAM'",
        "repr(sock).startswith('<socket.socket fd=')",
        "sock.makefile('rb').readable()",
        "'makefile' in dir(sock)",
        "sock.get_inheritable() is False",
    ],
)
def test_more_makes_it_a_whole_socket(arun, what):
    async def main():
        question = f"({LOADED}, {what}, {LOADED})"
        assert await ask(afork.Fork.new(), question) == (False, True, True)

    arun(main)


def test_a_template_with_the_module_hands_out_whole_ones(arun):
    async def main():
        f = afork.Fork.new().require("socket")
        what = "type(sock) is sys.modules['socket'].socket"
        assert await ask(f.fork(), what) is True
        # and one that runs it itself
        assert await ask(f, what) is True

    arun(main)


def test_a_function_whose_module_loads_it_gets_a_whole_one(arun, tmp_path):
    (tmp_path / "worker_of_sockets.py").write_text(
        "import socket\n"
        "def show(sock): sock.sendall(repr(type(sock) is socket.socket).encode())\n"
    )

    async def main():
        f = afork.Fork.new().eval(
            "import sys; sys.path.insert(0, args[0])", str(tmp_path)
        )
        assert await read_all(await f.run("worker_of_sockets.show")) == b"True"

    arun(main)


def test_received_sockets_are_of_the_same_kind(arun):
    async def main():
        a, b = socket.socketpair()
        with a, b, socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as c:
            a.setblocking(False)
            f = afork.Fork.new().send_fh(a, b, c)
            what = f"({LOADED}, [x.gettimeout() for x in args], args[2].family.name)"
            answer = await ask(f, what)
        assert answer == (False, [0.0, None, None], "AF_INET6")

    arun(main)


def test_close_waits_for_files_made_of_it():
    ours, theirs = pair()
    with theirs, ours.makefile("wb") as file:
        ours.close()
        file.write(b"x")
        file.flush()
        assert theirs.recv(2) == b"x"
    assert ours.fileno() == -1


def test_close_and_detach():
    ours, theirs = pair()
    with theirs:
        assert type(ours) is _worker_socket.socket
        with ours as same:
            assert same is ours
        assert type(ours) is _worker_socket.socket
        assert ours.fileno() == -1
        assert theirs.recv(1) == b""
    ours, theirs = pair()
    with theirs:
        socket.socket(fileno=ours.detach()).close()
        with ours:
            pass
        assert theirs.recv(1) == b""


def test_what_a_socket_refuses_it_refuses():
    import pickle

    ours, theirs = pair()
    with theirs, ours:
        with pytest.raises(TypeError, match="cannot pickle 'socket' object"):
            pickle.dumps(ours)
        assert type(ours) is socket.socket
    ours, theirs = pair()
    with theirs, ours, pytest.raises(AttributeError, match="no_such"):
        _ = ours.no_such


def test_types_of_another_layout_are_refused():
    class Empty:
        __slots__ = ()

    class Named:
        __slots__ = ("name",)

    class Other:
        __slots__ = ("other",)

    for there in (object(), 1, Empty(), Named()):
        for to in (Other, int, socket.socket):
            with pytest.raises(TypeError, match="the layout differs"):
                _afork.change_type(there, to)


# -- the end of a worker


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("print('text', end='')", "text"),
        ("sys.stdout.buffer.write(b'bytes')", "bytes"),
        ("print('x'); sys.stdout.flush(); print('y', end='')", "x\ny"),
        ("sys.stdout = open(1, 'w', closefd=False); print('new')", "new\n"),
        ("sys.stdout.close()", ""),
        ("sys.stdout = None", ""),
        ("import threading; print('threads', end='')", "threads"),
        ("import atexit; atexit.register(print, 'exit', end='')", "exit"),
        ("pass", ""),
    ],
)
@pytest.mark.parametrize("fork", [True, False])
def test_output_comes_before_the_end_of_file(run_script, code, output, fork):
    done = run_script(
        f"""
import asyncio, os, sys, afork
async def main():
    r, w = os.pipe()
    saved = os.dup(1)
    os.dup2(w, 1)
    f = afork.Fork.new_exec().eval('import sys; print("template", end="|", flush={not fork})')
    os.dup2(saved, 1)
    f.eval("def worker(sock, code): exec(code, globals())")
    f.send_arg({code!r})
    worker = f.fork() if {fork} else f
    sock = await worker.run("worker")
    assert await asyncio.get_running_loop().sock_recv(sock, 1) == b""
    sock.close()
    os.close(w)
    if {"exit" in code} or {"threads" in code}:
        await worker.wait()
    os.set_blocking(r, False)
    print(os.read(r, 999).decode())
asyncio.run(main())
"""
    )
    assert done.stdout == f"template|{output}\n"


def test_handlers_of_an_idle_template_are_called(arun):
    """Not only before its first fork, when Python has just run anyway."""

    async def main():
        f = afork.Fork.new().eval(
            """
import signal, sys
count = 0
def handler(*args):
    global count
    count += 1
signal.signal(signal.SIGUSR1, handler)
"""
        )
        assert await ask(f.fork(), "count") == 0
        for i in 1, 2:
            f.send_signal(signal.SIGUSR1)
            for _ in range(1000):
                if await ask(f.fork(), "count") == i:
                    break
            else:
                pytest.fail("the handler was not called")

    arun(main)


@pytest.mark.parametrize("n", [0, 6, 7, 8, 100])
def test_few_and_many_arguments(arun, n):
    """Few of them are not worth touching the heap for."""

    async def main():
        f = afork.Fork.new().send_arg(*map(str, range(n)))
        assert await ask(f, "args") == tuple(map(str, range(n)))

    arun(main)


def test_modules_that_make_their_attributes(arun, tmp_path):
    (tmp_path / "module_with_getattr.py").write_text(
        "def __getattr__(name):\n"
        "    if name == 'made': return lambda sock: sock.sendall(b'made')\n"
        "    raise AttributeError(name)\n"
    )

    async def main():
        f = afork.Fork.new().eval(
            "import sys; sys.path.insert(0, args[0])", str(tmp_path)
        )
        f.require("module_with_getattr")
        assert await read_all(await f.fork().run("module_with_getattr.made")) == b"made"
        with pytest.raises(afork.RemoteError, match="other"):
            await f.fork().run("module_with_getattr.other")

    arun(main)
