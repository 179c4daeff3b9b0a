"""OutputPipe: what workers write, as lines, copied, and their last words."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import pty
import resource
import signal
import socket
import tty

import pytest

import afork
from afork.rpc._output import BUFFER_MAX, CHUNK, LINE_MAX, TAIL_MAX, OutputPipe

from .conftest import open_descriptors
from .scripts.api_ask import ended

PRELUDE = """
import os, signal, subprocess, sys
from afork.rpc._redirect import redirect

def standard(*handles):
    for number, handle in enumerate(handles, 1):
        redirect(handle.fileno(), number)
        handle.close()
"""


class Lines(list):
    """A sink that can be waited for."""

    def __init__(self):
        self.changed = asyncio.Event()

    def __call__(self, line):
        self.append(line)
        self.changed.set()

    async def until(self, predicate):
        while not predicate(self):
            self.changed.clear()
            await self.changed.wait()


async def start(code, *pipes, handles=()):
    """Enter work(sock, *pipes, *handles) in a process of its own."""
    f = afork.Fork.new().eval(PRELUDE).eval(code)
    f.send_fh(*(pipe.write_fd for pipe in pipes), *handles)
    for pipe in pipes:
        pipe.close_write()
    return f, await f.run("work")


async def turns_until(predicate):
    """Let the loop turn until something is so; arun puts a limit on it."""
    while not predicate():
        await asyncio.sleep(0)


def collect_exceptions(loop):
    found = []
    loop.set_exception_handler(lambda loop, context: found.append(context["exception"]))
    return found


async def read_blocking(fd, size):
    """Read from a blocking pipe in a thread."""

    def read():
        data = bytearray()
        while len(data) < size and (chunk := os.read(fd, 65536)):
            data += chunk
        return bytes(data)

    # Not the loop's executor, whose threads stay.
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return await asyncio.get_running_loop().run_in_executor(pool, read)


# -- lines


def test_lines_of_python_and_of_programs(arun):
    async def main():
        loop = asyncio.get_running_loop()
        out, err = Lines(), Lines()
        pipes = OutputPipe(loop, out), OutputPipe(loop, err)
        f, sock = await start(
            """
            def work(sock, *handles):
                standard(*handles)
                print("prïnt", 1)
                print("error", file=sys.stderr)
                os.write(1, b"write\\n\\n")
                subprocess.run("echo program; echo oops >&2", shell=True)
                sock.recv(1)
            """,
            *pipes,
        )
        # While it runs: nothing waits in a buffer.
        await out.until(lambda lines: len(lines) == 4)
        await err.until(lambda lines: len(lines) == 2)
        assert out == ["prïnt 1", "write", "", "program"]
        assert err == ["error", "oops"]
        assert pipes[0].tail() == "prïnt 1\nwrite\n\nprogram\n"
        sock.close()
        assert await f.wait() == 0
        for pipe in pipes:
            pipe.close()

    arun(main)


def test_a_character_in_two_reads(arun):
    async def main():
        lines = Lines()
        pipe = OutputPipe(asyncio.get_running_loop(), lines)
        for part in b"\xc3", b"\xa4\xe2", b"\x82", b"\xac\nrest":
            os.write(pipe.write_fd, part)
            pipe.tail()
        assert lines == ["ä€"]
        pipe.close()
        assert lines == ["ä€", "rest"]
        pipe.close()
        assert lines == ["ä€", "rest"]

    arun(main)


def test_what_is_not_utf8_is_replaced(arun):
    async def main():
        lines = Lines()
        pipe = OutputPipe(asyncio.get_running_loop(), lines)
        os.write(pipe.write_fd, b"a\xffb\0\r\n")
        await lines.until(bool)
        assert lines == ["a\ufffdb\0\r"]
        pipe.close()

    arun(main)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("over", [0, 1, LINE_MAX, LINE_MAX + 5])
def test_long_lines_come_in_pieces(arun, over, finished):
    text = "x" * (LINE_MAX + over)

    async def main():
        lines = Lines()
        pipe = OutputPipe(asyncio.get_running_loop(), lines)
        end = b"\nlast\n" if finished else b""
        f, sock = await start(
            f"""
            def work(sock, out):
                left = memoryview(b"x" * {len(text)} + {end})
                while left:
                    left = left[out.write(left):]
            """,
            pipe,
        )
        assert await f.wait() == 0
        sock.close()
        # At the end of file what is unfinished comes as well.
        await turns_until(lambda: pipe._read_fd < 0)
        expected = [text[i : i + LINE_MAX] for i in range(0, len(text), LINE_MAX)]
        assert lines == [*expected, *(["last"] if finished else [])]
        pipe.close()

    arun(main)


def test_pieces_end_between_characters(arun):
    async def main():
        lines = Lines()
        pipe = OutputPipe(asyncio.get_running_loop(), lines)
        text = "xy" + "€" * 2 * (LINE_MAX // 3)
        pipe._take(text.encode() + b"\n")
        # nor of bytes that are no characters
        pipe._take(b"\x80" * (LINE_MAX + 1) + b"\n")
        pipe.close()
        assert "".join(lines[:-2]) == text
        assert len(lines) == 5
        assert "\ufffd" not in "".join(lines[:-2])
        assert [len(x) for x in lines[-2:]] == [LINE_MAX, 1]

    arun(main)


def test_an_exception_of_the_function_stops_nothing(arun):
    async def main():
        loop = asyncio.get_running_loop()
        found = collect_exceptions(loop)
        lines = Lines()

        def sink(line):
            lines(line)
            if line == "2":
                raise asyncio.CancelledError
            raise ValueError(line)

        pipe = OutputPipe(loop, sink)
        os.write(pipe.write_fd, b"1\n2\n3\n")
        await lines.until(lambda _: len(lines) == 3)
        os.write(pipe.write_fd, b"4\n")
        await lines.until(lambda _: len(lines) == 4)
        assert [type(exc) for exc in found] == [
            ValueError,
            asyncio.CancelledError,
            ValueError,
            ValueError,
        ]
        pipe.close()

    arun(main)


def test_the_function_may_ask_for_the_tail_and_close(arun):
    async def main():
        lines = Lines()

        def sink(line):
            lines(line)
            if line == "1":
                os.write(pipe.write_fd, b"4\n5")
                assert pipe.tail() == "1\n2\n3\n4\n5"
            elif line == "2":
                pipe.close()

        pipe = OutputPipe(asyncio.get_running_loop(), sink)
        os.write(pipe.write_fd, b"1\n2\n3\n")
        await lines.until(lambda _: len(lines) == 5)
        assert lines == ["1", "2", "3", "4", "5"]

    arun(main)


# -- last words


def test_the_tail_of_a_killed_worker(arun):
    async def main():
        pipe = OutputPipe(asyncio.get_running_loop(), None)
        f, sock = await start(
            """
            def work(sock, err):
                redirect(err.fileno(), 2)
                sys.stderr.write("x" * 300000)
                for i in range(100):
                    print("line", i, file=sys.stderr)
                sys.stderr.write("unfinished")
                sys.stderr.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            """,
            pipe,
        )
        assert await f.wait() == -9
        sock.close()
        tail = pipe.tail()
        assert len(tail) == TAIL_MAX
        last = "".join(f"line {i}\n" for i in range(100)) + "unfinished"
        assert tail.endswith("x" + last)
        pipe.close()
        assert pipe.tail() == tail

    arun(main)


def test_the_tail_begins_with_a_whole_character(arun):
    async def main():
        pipe = OutputPipe(asyncio.get_running_loop(), None)
        assert pipe.tail() == ""
        for shift in range(4):
            os.write(pipe.write_fd, "€".encode() * 2000 + b"a" * shift)
            assert set(pipe.tail()) <= {"€", "a"}
        pipe.close()

    arun(main)


@pytest.mark.parametrize("program", ["cat", "yes"])
def test_a_program_that_keeps_the_pipe(arun, program):
    """It may even write for ever: neither tail nor close wait for its end."""

    async def main():
        loop = asyncio.get_running_loop()
        lines = Lines()
        pipe = OutputPipe(loop, lines)
        r, w = os.pipe()
        f, sock = await start(
            f"""
            def work(sock, out, stdin):
                standard(out)
                program = subprocess.Popen(["{program}"], stdin=stdin)
                sock.send(b"%d" % program.pid)
                os.write(1, b"last words\\n")
                os._exit(3)
            """,
            pipe,
            handles=[r],
        )
        os.close(r)
        assert await f.wait() == 3
        pid = int(await loop.sock_recv(sock, 100))
        sock.close()
        tail = pipe.tail()
        if program == "cat":
            assert tail == "last words\n"
        await lines.until(lambda _: "last words" in lines)
        pipe.close()
        os.close(w)
        assert ended(pid)

    arun(main)


def test_endless_output_does_not_keep_the_loop(arun):
    async def main():
        pipe = OutputPipe(asyncio.get_running_loop(), None)
        reads = []
        take = pipe._take
        pipe._take = lambda data: (reads.append(len(data)), take(data))
        f, sock = await start(
            """
            def work(sock, out):
                while True:
                    out.write(b"x" * 200000)
            """,
            pipe,
        )
        await turns_until(lambda: len(reads) > 100)
        assert max(reads) <= CHUNK
        f.kill()
        assert await f.wait() == -9
        sock.close()
        pipe.close()
        del pipe._take

    arun(main)


# -- copied to a descriptor


def test_a_slow_reader_makes_the_worker_wait(arun):
    size = 4 * 1024 * 1024

    async def main():
        loop = asyncio.get_running_loop()
        r, w = os.pipe()
        pipe = OutputPipe(loop, w)
        f, sock = await start(
            f"""
            def work(sock, out):
                data = memoryview(bytes(range(256)) * ({size} // 256))
                while data:
                    data = data[out.write(data):]
                sock.send(b"done")
            """,
            pipe,
        )
        await turns_until(lambda: pipe._paused)
        # Nobody reads: the worker cannot have finished, and we go on.
        with pytest.raises(BlockingIOError):
            sock.recv(1)
        assert BUFFER_MAX <= pipe._file.size < BUFFER_MAX + CHUNK
        # Not changed, as it may be the terminal's.
        assert os.get_blocking(w)
        os.close(w)
        data = await read_blocking(r, size)
        assert data == bytes(range(256)) * (size // 256)
        assert await loop.sock_recv(sock, 9) == b"done"
        assert await f.wait() == 0
        sock.close()
        await pipe.wait_closed()
        pipe.close()
        os.close(r)

    arun(main)


def test_what_a_slow_reader_has_not_taken_at_the_end(arun):
    async def main():
        r, w = os.pipe()
        pipe = OutputPipe(asyncio.get_running_loop(), w)
        size = 300_000
        f, sock = await start(
            f"""
            def work(sock, out):
                standard(out)
                print("x" * {size - 1})
            """,
            pipe,
        )
        assert await f.wait() == 0
        sock.close()
        pipe.close()
        os.close(w)
        waiting = asyncio.create_task(pipe.wait_closed())
        data, _ = await asyncio.gather(read_blocking(r, size), waiting)
        assert data == b"x" * (size - 1) + b"\n"
        # and nobody has it open any more
        assert os.read(r, 1) == b""
        os.close(r)

    arun(main)


def test_the_reader_goes_away(arun):
    async def main():
        loop = asyncio.get_running_loop()
        found = collect_exceptions(loop)
        r, w = os.pipe()
        pipe = OutputPipe(loop, w)
        f, sock = await start(
            """
            def work(sock, out):
                standard(out)
                for i in range(3):
                    print("x" * 1000000)
                print("last words")
            """,
            pipe,
        )
        await turns_until(lambda: pipe._paused)
        os.close(r)
        assert await f.wait() == 0
        assert pipe.tail().endswith("x\nlast words\n")
        assert [type(exc) for exc in found] == [BrokenPipeError]
        sock.close()
        os.close(w)
        await pipe.wait_closed()
        pipe.close()

    arun(main)


@pytest.fixture(params=["file", "null", "socket", "pty", "nonblocking"])
def place(request, tmp_path):
    """A descriptor to be written to, and how to read what has arrived."""
    with contextlib.ExitStack() as stack:
        if request.param == "file":
            file = stack.enter_context(open(tmp_path / "out", "a+b"))
            file.write(b"before")
            file.flush()
            yield file.fileno(), lambda: (tmp_path / "out").read_bytes()[6:]
        elif request.param == "null":
            file = stack.enter_context(open("/dev/null", "wb"))
            yield file.fileno(), None
        elif request.param == "socket":
            a, b = map(stack.enter_context, socket.socketpair())
            yield a.fileno(), lambda: b.recv(100)
        elif request.param == "pty":
            master, slave = pty.openpty()
            tty.setraw(slave)
            stack.callback(os.close, master)
            stack.callback(os.close, slave)
            yield slave, lambda: os.read(master, 100)
        else:
            r, w = os.pipe()
            os.set_blocking(w, False)
            stack.callback(os.close, r)
            stack.callback(os.close, w)
            yield w, lambda: os.read(r, 100)


def test_any_kind_of_descriptor(arun, place):
    fd, read = place

    async def main():
        flags = os.get_blocking(fd)
        pipe = OutputPipe(asyncio.get_running_loop(), fd)
        f, sock = await start(
            """
            def work(sock, out):
                standard(out)
                print("hello")
            """,
            pipe,
        )
        assert await f.wait() == 0
        assert pipe.tail() == "hello\n"
        await pipe.wait_closed()
        if read is not None:
            assert read() == b"hello\n"
        assert os.get_blocking(fd) == flags
        sock.close()
        pipe.close()

    arun(main)


def test_pipes_to_one_descriptor_share_it(arun):
    async def main():
        loop = asyncio.get_running_loop()
        r, w = os.pipe()
        before = len(open_descriptors())
        pipes = [OutputPipe(loop, w) for _ in range(20)]
        assert len(open_descriptors()) == before + 2 * 20 + 2
        for i, pipe in enumerate(pipes):
            os.write(pipe.write_fd, b"%d\n" % i)
        for pipe in reversed(pipes):
            pipe.close()
        expected = b"".join(b"%d\n" % i for i in reversed(range(20)))
        assert os.read(r, 1000) == expected
        assert len(open_descriptors()) == before
        # The number may be another file's later.
        pipes = [OutputPipe(loop, w)]
        r2, w2 = os.pipe()
        os.dup2(w2, w, inheritable=False)
        pipes.append(OutputPipe(loop, w))
        for pipe, end in zip(pipes, (r, r2), strict=True):
            os.write(pipe.write_fd, b"again")
            pipe.close()
            assert os.read(end, 100) == b"again"
        for fd in (r, w, r2, w2):
            os.close(fd)

    arun(main)


# -- limits and ends


@pytest.mark.parametrize("sink", [None, 1])
def test_no_descriptor_left(arun, sink):
    async def main():
        loop = asyncio.get_running_loop()
        fd = os.open("/dev/null", os.O_WRONLY)
        filler = [os.dup(fd) for _ in range(4)]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = max(open_descriptors()) + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    filler.append(os.dup(fd))
            made = None
            for count in range(5):  # noqa: B007
                before = set(filler)
                try:
                    made = OutputPipe(loop, fd if sink else None)
                except OSError:
                    for number in before:  # all are what they were
                        os.fstat(number)
                    os.close(filler.pop())
                else:
                    break
            assert count >= 2
            made.close()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for number in (fd, *filler):
                os.close(number)

    arun(main)


def test_bad_sinks(arun):
    async def main():
        loop = asyncio.get_running_loop()
        before = set(open_descriptors())
        for sink in ("text", True, 1.5):
            with pytest.raises(TypeError, match=type(sink).__name__):
                OutputPipe(loop, sink)
        with pytest.raises(ValueError, match="negative"):
            OutputPipe(loop, -1)
        with pytest.raises(OSError, match="Bad file descriptor"):
            OutputPipe(loop, 1_000_000)
        r = os.open("/dev/null", os.O_RDONLY)
        with pytest.raises(OSError, match="not open for writing"):
            OutputPipe(loop, r)
        os.close(r)
        gc.collect()
        assert set(open_descriptors()) == before

    arun(main)


def test_a_closed_standard_stream_is_no_sink(run_script):
    """Its number is another file's, perhaps a socket to a template."""
    run_script(
        """
import asyncio, os, socket
from afork.rpc._output import OutputPipe

os.close(2)
a, b = socket.socketpair()
assert a.fileno() == 2

async def main():
    pipe = OutputPipe(asyncio.get_running_loop(), 2)
    os.write(pipe.write_fd, b"text")
    assert pipe.tail() == "text"
    await pipe.wait_closed()
    pipe.close()

asyncio.run(main())
b.setblocking(False)
try:
    print(b.recv(100))
except BlockingIOError:
    os._exit(0)
"""
    )


def test_what_outlives_its_loop(loop_factory):
    r, w = os.pipe()
    loop = loop_factory()
    pipes = [OutputPipe(loop, sink) for sink in (None, print, w, w)]
    os.write(pipes[2].write_fd, b"x" * 60000)
    os.write(pipes[3].write_fd, b"x" * 60000)
    pipes[2].tail(), pipes[3].tail()
    assert pipes[3]._file.size
    loop.close()
    pipes[0].close()
    pipes[2].close()
    pipes[2].close()
    # Finalisers of a cycle run in any order.
    pipes[3]._file.__del__()
    pipes[3].__del__()
    # The leak guard looks at the rest.
    os.close(r)
    os.close(w)


def test_a_killed_worker_ends_nothing_else(arun):
    async def main():
        loop = asyncio.get_running_loop()
        lines = Lines()
        pipes = [OutputPipe(loop, lines) for _ in range(2)]
        workers = [
            await start(
                """
                def work(sock, out):
                    standard(out)
                    while line := sock.recv(100):
                        print(line.decode())
                """,
                pipe,
            )
            for pipe in pipes
        ]
        (f, sock), (g, sock2) = workers
        f.send_signal(signal.SIGKILL)
        assert await f.wait() == -9
        await turns_until(lambda: pipes[0]._read_fd < 0)
        await loop.sock_sendall(sock2, b"alive")
        await lines.until(bool)
        assert lines == ["alive"]
        sock.close()
        sock2.close()
        assert await g.wait() == 0
        for pipe in pipes:
            pipe.close()

    arun(main)
