"""What a worker and a program inherit, compared with a golden table.

The application has 50 descriptors open, most of them inheritable, ignores and
blocks signals, and may lack its standard streams: nothing of it may show.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys

import pytest

import afork

from .conftest import SCRIPTS
from .scripts.api_ask import PYTHONPATH


def mask(*numbers: int) -> str:
    return f"{sum(1 << (n - 1) for n in numbers):016x}"


@pytest.fixture(
    scope="module",
    params=["", "dirty", "0", "1", "2", "0 1 2", "dirty 0 1 2"],
    ids=lambda state: state.replace(" ", "-") or "clean",
)
def answers(request, tmp_path_factory):
    """What the application of tests/scripts/api_inherit.py has found."""
    target = tmp_path_factory.mktemp("inherit") / "answers"
    state = request.param.split()
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "api_inherit.py"), str(target), *state],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "API_CLEAN": "1"},
        umask=0o022,
        cwd="/",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    found = json.loads(target.read_text())
    found["dirty"] = "dirty" in state
    found["closed"] = [int(n) for n in state if n != "dirty"]
    return found


def streams(answers) -> dict[str, str]:
    kinds = {"0": "/dev/null", "1": "pipe", "2": "pipe"}
    kinds.update((str(n), "/dev/null") for n in answers["closed"])
    return kinds


@pytest.mark.parametrize("name", ["worker", "tree"])
def test_worker(answers, name):
    found = answers[name]
    fds = found["fds"]
    (number,) = set(fds) - {"0", "1", "2"}
    assert fds == {**streams(answers), number: "socket"}
    # what a fresh CPython has
    assert found["SigBlk"] == mask()
    assert found["SigIgn"] == mask(signal.SIGPIPE, signal.SIGXFSZ)
    assert found["SigCgt"] == mask(signal.SIGINT)
    assert found["leader"] == [False, False]
    assert found["deathsig"] == signal.SIGKILL
    if name == "worker":
        assert found["parent"] == found["session"] == answers["template"]
    check_common(answers, found)


@pytest.mark.parametrize("name", ["exec", "subprocess"])
def test_program(answers, name):
    found = answers[name]
    number = "7" if name == "exec" else answers["number"]
    assert found["fds"] == {**streams(answers), number: "socket"}
    # the program is a Python: by now it has put on what a Python has
    assert found["SigBlk"] == mask()
    assert found["SigIgn"] == mask(signal.SIGPIPE, signal.SIGXFSZ)
    assert found["SigCgt"] == mask(signal.SIGINT)
    assert found["leader"] == [False, False]
    assert found["deathsig"] == signal.SIGKILL
    assert found["parent"] == found["session"] == answers["template"]
    check_common(answers, found)


def check_common(answers, found) -> None:
    dirty = answers["dirty"]
    assert found["Umask"] == ("0027" if dirty else "0022")
    assert found["cwd"] == ("/usr" if dirty else "/")
    assert found["NoNewPrivs"] == "0"
    assert found["Threads"] == "1"
    assert found["nice"] == os.nice(0)
    assert found["env"] == answers["env"]
    assert ("API_DIRTY" in found["env"]) == dirty
    limits = {str(n): list(resource.getrlimit(n)) for n in range(16)}
    if dirty:
        limits[str(resource.RLIMIT_CORE)] = [0, 0]
    assert found["limits"] == limits


def test_programs_start_with_all_signals_at_default(run_script):
    """As a program sees them that changes none itself."""
    done = run_script(
        r"""
import asyncio, signal, sys
for n in (signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD):
    signal.signal(n, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2})
import afork
async def main():
    command = ("sed", "-n", r"/^Sig\(Blk\|Ign\|Cgt\)/p", "/proc/self/status")
    f = afork.Fork.new()
    await f.exec(*command)
    await f.wait()
    p = await afork.create_subprocess_exec(*command)
    await p.wait()
    # and when the process itself has changed them
    f = afork.Fork.new().eval('''
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGUSR1, print)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
''')
    await f.exec(*command)
    await f.wait()
asyncio.run(main())
""",
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    lines = [line.split(":\t") for line in done.stdout.splitlines()]
    # posix_spawn of glibc leaves its two internal signals ignored for good
    internal = 1 << 31 | 1 << 32
    masks = [(name, int(text, 16) & ~internal) for name, text in lines]
    assert masks == [("SigBlk", 0), ("SigIgn", 0), ("SigCgt", 0)] * 3


def test_template_holds_nothing_of_ours(arun):
    """Only its streams and its socket."""

    async def main():
        r, w = os.pipe()
        os.set_inheritable(r, True)
        template = await afork.Fork.new_exec().ready()
        fds = sorted(map(int, os.listdir(f"/proc/{template.pid}/fd")))
        assert fds[:3] == [0, 1, 2]
        (rest,) = fds[3:]
        assert os.readlink(f"/proc/{template.pid}/fd/{rest}").startswith("socket:")
        os.close(r)
        os.close(w)

    arun(main)


def test_no_new_privs_is_inherited(run_script):
    """It cannot be undone, and must not be lost."""
    done = run_script(
        """
import asyncio, ctypes
assert ctypes.CDLL(None).prctl(38, 1, 0, 0, 0) == 0
import afork
async def main():
    f = afork.Fork.new()
    await f.exec("grep", "NoNewPrivs", "/proc/self/status")
    await f.wait()
asyncio.run(main())
""",
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    assert done.stdout == "NoNewPrivs:\t1\n"
