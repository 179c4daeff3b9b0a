"""redirect and Capture: the standard streams of a worker, in the worker."""

from __future__ import annotations

import asyncio

import pytest

import afork
from afork.rpc._output import OutputPipe

from .conftest import read_all
from .scripts.api_ask import ended

PRELUDE = """
import ctypes, fcntl, os, resource, subprocess, sys
from afork.rpc._redirect import CAPTURE_MAX, Capture, redirect

libc = ctypes.CDLL(None)

def open_files():
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink("/proc/self/fd/" + name)
        except OSError:  # the one that listed them
            pass
    return found
"""


@pytest.fixture
def work(arun):
    """Run the body of a function in a worker; what it returned and printed.

    Its standard streams lead to the first and second result, raw.
    """

    def run(body):
        indented = "\n".join("    " + x for x in body.splitlines())

        async def main():
            loop = asyncio.get_running_loop()
            pipes = OutputPipe(loop, None), OutputPipe(loop, None)
            f = afork.Fork.new().eval(PRELUDE)
            f.eval(
                f"""
def body():
{indented}

def work(sock, out, err):
    for number, handle in enumerate((out, err), 1):
        redirect(handle.fileno(), number)
        handle.close()
    sock.sendall(repr(body()).encode())
"""
            )
            f.send_fh(*(pipe.write_fd for pipe in pipes))
            for pipe in pipes:
                pipe.close_write()
            answer = await read_all(await f.run("work"))
            code = await f.wait()
            out, err = (pipe.tail() for pipe in pipes)
            for pipe in pipes:
                pipe.close()
            assert (code, err) == (0, ""), err
            return eval(answer), out

        return arun(main)

    return run


# -- redirect


def test_what_was_written_before_stays(work):
    """And the received descriptor is the caller's to close."""
    answer, out = work(
        """
sys.stdout.reconfigure(line_buffering=False)
print("python", end=" ")
libc.printf(b"C ")
file = os.memfd_create("target")
redirect(file, 1)
print("line")
at_once = os.pread(file, 100, 0)
libc.printf(b"C\\n")
redirect(file, 1)
return at_once, os.pread(file, 100, 0), os.fstat(file) == os.fstat(1)
"""
    )
    assert answer == (b"line\n", b"line\nC\n", True)
    assert out == "python C "


def test_redirect_to_itself_and_to_other_numbers(work):
    answer, out = work(
        """
os.set_inheritable(1, False)
redirect(1, 1)
errors = []
for fd, number in (1, 0), (1, 3), (1000, 1):
    try:
        redirect(fd, number)
    except (ValueError, OSError) as exc:
        errors.append(type(exc).__name__)
subprocess.run(["echo", "inherited"])
return errors
"""
    )
    assert answer == ["ValueError", "ValueError", "OSError"]
    assert out == "inherited\n"


@pytest.mark.parametrize(
    "before",
    [
        "sys.stdout = None",
        "sys.stdout.close()",
        "os.close(1)",
        "sys.stdout.close(); os.close(1)",
        "sys.stdout = sys.__stdout__ = None; os.close(1)",
    ],
)
def test_redirect_of_a_closed_stream(work, before):
    answer, out = work(
        f"""
copy = os.dup(1)
{before}
redirect(copy, 1)
print("ä", sys.stdout.fileno())
subprocess.run(["echo", "program"])
return sys.stdout.line_buffering
"""
    )
    assert answer is True
    assert out == "ä 1\nprogram\n"


def test_redirect_keeps_an_object_of_the_users(work):
    answer, _ = work(
        """
import io
sys.stdout = text = io.StringIO()
redirect(2, 1)
print("object")
return text.getvalue(), sys.stdout is text
"""
    )
    assert answer == ("object\n", True)


def test_importing_it_loads_next_to_nothing(run_script):
    done = run_script(
        """
import sys
import afork._child
import socket
before = set(sys.modules)
import afork.rpc._redirect
print(*sorted(set(sys.modules) - before))
""",
    )
    assert done.stdout.split() == ["afork.rpc", "afork.rpc._redirect", "fcntl"]


# -- Capture


def test_everything_is_captured(work):
    answer, out = work(
        """
print("before", end="")
libc.printf(b" C-before")
capture = Capture()
with capture as c:
    assert c is capture
    print("python")
    sys.stderr.write("unfinished")
    os.write(1, b"write\\n")
    libc.printf(b"C\\n")
    subprocess.run("echo program; echo error >&2; echo again >>/dev/stderr; echo error >&2", shell=True)
print(" after")
return c.stdout, c.stderr, c.truncated
"""
    )
    # What C prints, and unfinished lines, are in buffers until the end.
    assert answer == (
        b"python\nwrite\nprogram\nC\n",
        b"error\nagain\nerror\nunfinished",
        False,
    )
    assert out == "before C-before after\n"


def test_an_exception_passes(work):
    answer, out = work(
        """
results = []
c = Capture()
for error in ValueError("x"), SystemExit(3), KeyboardInterrupt():
    before = open_files()
    try:
        with c:
            print("so far", end="")
            raise error
    except BaseException as exc:
        results.append((exc is error, c.stdout, open_files() == before))
return results
"""
    )
    assert answer == [(True, b"so far", True)] * 3
    assert out == ""


@pytest.mark.parametrize(
    "damage",
    [
        "os.close(1); os.close(2)",
        "sys.stdout.close(); sys.stderr.close()",
        "sys.stdout = sys.stderr = None",
        "sys.stdout = sys.stderr = open(os.devnull, 'w')",
        "os.dup2(os.open(os.devnull, os.O_RDWR), 1)",
    ],
)
def test_what_the_function_does_to_its_streams(work, damage):
    answer, out = work(
        f"""
streams = sys.stdout, sys.stderr
c = Capture()
with c:
    print("text")
    print("rest", end="")
    {damage}
sys.stdout, sys.stderr = (
    (sys.stdout, sys.stderr) if streams[0].closed else streams
)
print("after")
with c:
    print("second")
return c.stdout, c.stderr
"""
    )
    assert answer == (b"second\n", b"")
    assert out == "after\n"


@pytest.mark.parametrize("before", [True, False])
def test_each_line_is_written_at_once(work, before):
    """A crash would lose it; afterwards the stream is as it was."""
    answer, _ = work(
        f"""
sys.stdout.reconfigure(line_buffering={before})
with Capture() as c:
    print("line")
    at_once = os.pread(c.files[0], 100, 0)
return at_once, sys.stdout.line_buffering
"""
    )
    assert answer == (b"line\n", before)


@pytest.mark.parametrize(
    "before",
    ["sys.stdout.close()", "sys.stdout = type('Own', (), {'line_buffering': False})()"],
)
def test_streams_that_cannot_do_that(work, before):
    answer, _ = work(
        f"""
{before}
with Capture() as c:
    os.write(1, b"captured")
return c.stdout
"""
    )
    assert answer == b"captured"


def test_text_left_when_1_is_closed_is_captured(work):
    answer, out = work(
        """
c = Capture()
with c:
    print("rest", end="")
    os.close(1)
return c.stdout
"""
    )
    assert (answer, out) == (b"rest", "")


def test_streams_that_were_closed_before_are_closed_after(work):
    answer, _ = work(
        """
kept = os.dup(1), os.dup(2)
os.close(0), os.close(1), os.close(2)
before = open_files()
with Capture() as c:
    os.write(1, b"out")
    os.write(2, b"err")
after = open_files()
for number, fd in enumerate(kept, 1):
    os.dup2(fd, number)
return before == after, c.stdout, c.stderr
"""
    )
    assert answer == (True, b"out", b"err")


def test_no_descriptor_left(work):
    """Both streams are captured, or neither, and the function has not run."""
    answer, out = work(
        """
results = []
c = Capture()
filler = []
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
try:
    while True:
        filler.append(os.dup(0))
except OSError:
    pass
for free in range(5):
    if free:
        os.close(filler.pop())
    before = [os.fstat(fd) for fd in (1, 2)]
    entered = False
    try:
        with c:
            entered = True
            print("captured")
    except OSError as exc:
        assert exc.errno == 24
    same = before == [os.fstat(fd) for fd in (1, 2)]
    # and what was free is free
    again = [os.dup(0) for _ in range(free)]
    for fd in again:
        os.close(fd)
    results.append((entered, same, c.stdout))
print("visible")
return results
"""
    )
    assert answer == [(False, True, b"")] * 4 + [(True, True, b"captured\n")]
    assert out == "visible\n"


def test_big_output_keeps_its_end(work):
    answer, _ = work(
        """
c = Capture()
results = []
for size in CAPTURE_MAX, CAPTURE_MAX + 1, 0:
    with c:
        sys.stdout.write("a" * (size and size - 3) + "end"[:size])
        os.write(2, b"err")
    results.append((len(c.stdout), c.stdout[-4:], c.stderr, c.truncated))
return CAPTURE_MAX, results
"""
    )
    size, results = answer
    assert size == 16 * 1024 * 1024
    assert results == [
        (size, b"aend", b"err", False),
        (size, b"aend", b"err", True),
        (0, b"", b"err", False),
    ]


def test_nested_and_twice(work):
    answer, _ = work(
        """
with Capture() as outer:
    print("1")
    with Capture() as inner:
        print("2")
        try:
            with inner:
                pass
        except RuntimeError as exc:
            print(exc)
    print("3")
return outer.stdout, inner.stdout
"""
    )
    assert answer == (b"1\n3\n", b"2\nthis Capture is in use\n")


def test_a_program_left_behind_does_not_write_into_the_next(work):
    (first, second, pid), _ = work(
        """
stdin, gate = os.pipe()
with Capture() as c:
    program = subprocess.Popen(["cat"], stdin=stdin)
    print("first")
first = c.stdout
with c:
    os.write(gate, b"late")
    os.close(gate)
    program.wait()
    print("second")
return first, c.stdout, program.pid
"""
    )
    assert (first, second) == (b"first\n", b"second\n")
    assert ended(pid)
