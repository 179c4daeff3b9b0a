"""Early and Template: the main program, forked as a template."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import afork

PACKAGE = Path(afork.__file__).parent.parent


@pytest.fixture
def program(tmp_path):
    """Run a main program from a file; its output, with nothing on stderr."""

    def run(source: str, *args: str, status: int = 0, name: str = "prog.py") -> str:
        (tmp_path / name).write_text(source)
        done = subprocess.run(
            [sys.executable, "-W", "error", name, *args],
            capture_output=True,
            text=True,
            timeout=30,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{PACKAGE}:{tmp_path}"},
        )
        assert (done.returncode, done.stderr) == (status, "")
        return done.stdout

    return run


TAIL = """
import asyncio

async def answer(f, func):
    sock = await f.run(func)
    data = b""
    while chunk := await asyncio.get_running_loop().sock_recv(sock, 999):
        data += chunk
    sock.close()
    return data.decode()
"""


def test_template_has_the_main_program(program):
    out = program(
        """
import json, os, sys
prepared = {"x": 1}

def worker(sock, *args):
    sock.sendall(repr((__name__, prepared, args, "json" in globals(), "asyncio" in sys.modules, os.getppid(), sys.argv)).encode())

from afork.template import TEMPLATE
later = 1
"""
        + TAIL
        + """
async def main():
    for func in (worker, "worker", "__main__:worker"):
        f = TEMPLATE.fork().send_arg("a")
        name, prepared, args, has_json, has_asyncio, parent, argv = eval(await answer(f, func))
        assert (name, prepared, args) == ("__main__", {"x": 1}, ("a",))
        assert has_json and not has_asyncio
        assert parent == TEMPLATE.pid
        assert argv == sys.argv
        assert await f.wait() == 0
    print("ok")

asyncio.run(main())
"""
    )
    assert out == "ok\n"


def test_what_comes_after_is_not_there(program):
    out = program(
        """
import afork
T = afork.fork_main()
later = 1
def worker(sock): pass
"""
        + TAIL
        + """
async def main():
    try:
        await T.fork().run(worker)
    except afork.RemoteError as exc:
        print(exc.type, exc.message)
asyncio.run(main())
"""
    )
    assert out == "AttributeError module '__main__' has no attribute 'worker'\n"


def test_several_templates_of_one_program(program):
    out = program(
        """
import afork
x = 1
def worker(sock): sock.sendall(b"%d" % x)
one = afork.fork_main()
x = 2
two = afork.fork_main()
x = 3
"""
        + TAIL
        + """
async def main():
    print(await answer(one.fork(), worker), await answer(two.fork(), worker))
    print(await answer(one.fork().fork().eval("x = 7"), worker))
    print(await answer(one, worker), one.returncode)
asyncio.run(main())
"""
    )
    assert out.splitlines()[:2] == ["1 2", "7"]
    assert out.splitlines()[2].split()[0] == "1"


def test_workers_import_the_main_module_without_forking_again(program, tmp_path):
    """fork_main is None in a process that afork has made."""
    out = program(
        """
import afork
T = afork.fork_main()
def worker(sock): sock.sendall(repr((__name__, T)).encode())
"""
        + TAIL
        + """
async def main():
    print(await answer(afork.Fork.new(), worker))
if __name__ == "__main__":
    asyncio.run(main())
"""
    )
    assert out == "('__mp_main__', None)\n"


def test_import_machinery_is_left_clean(program, tmp_path):
    """TEMPLATE is made in the middle of an import, whose lock the child has."""
    (tmp_path / "api_middle.py").write_text(
        "before = 1\nfrom afork.template import TEMPLATE\nafter = 1\n"
    )
    (tmp_path / "api_sub.py").write_text("value = 5\n")
    out = program(
        """
import sys
import api_middle

def _unused(): pass
"""
        + TAIL
        + """
async def main():
    f = api_middle.TEMPLATE.fork().eval('''
import sys, warnings
warnings.simplefilter("error")
import api_middle, afork.template, api_sub
import _frozen_importlib as b
def state(sock):
    import threading
    initializing = [n for n, m in sys.modules.items()
        if getattr(getattr(m, "__spec__", None), "_initializing", False)]
    done = []
    def work():
        import afork.template, api_middle
        done.append(hasattr(api_middle, "before"))
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(5)
    locks = [n for n, r in b._module_locks.items() if r() and r().owner]
    sock.sendall(repr((initializing, done, locks, hasattr(api_middle, "after"), api_sub.value)).encode())
''')
    print(await answer(f, "state"))
asyncio.run(main())
"""
    )
    assert out == "([], [True], [], False, 5)\n"


def test_output_before_the_fork_is_not_repeated(program):
    out = program(
        """
import sys, atexit
sys.stdout.write("once ")
atexit.register(print, "handler")
import afork
T = afork.fork_main()
def worker(sock): pass
"""
        + TAIL
        + """
async def main():
    async with T:
        f = T.fork().eval("def worker(sock): print('worker', end=' ')")
        await answer(f, "worker")
        await f.wait()
    print(T.returncode)
asyncio.run(main())
"""
    )
    assert out == "once worker 0\nhandler\n"


def test_refused_with_threads_or_a_running_loop(program):
    out = program(
        """
import afork, asyncio, threading

def attempt():
    try:
        afork.fork_main()
    except RuntimeError as exc:
        print(exc)

async def main():
    attempt()
asyncio.run(main())

stop = threading.Event()
thread = threading.Thread(target=stop.wait, name="mine")
thread.start()
attempt()
try:
    import afork.early
except RuntimeError as exc:
    print(exc)
stop.set()
thread.join()
T = afork.fork_main()
T.close()
asyncio.run(T.wait())
print(T.returncode)
"""
    )
    lines = out.splitlines()
    assert lines[0] == "fork_main() must come before the event loop runs"
    assert lines[1] == (
        "fork_main() needs a program without other threads: MainThread, mine"
    )
    assert lines[2].startswith("afork.early needs a program without other threads")
    assert lines[3] == "0"


def test_early_is_the_root_of_all(program):
    out = program(
        """
import afork.early
import os, sys, json, decimal
loaded_later = 1

def worker(sock): pass
"""
        + TAIL
        + """
ASK = '''
def ask(sock):
    import os, sys
    sock.sendall(repr((os.getppid(), "decimal" in sys.modules, "asyncio" in sys.modules, "loaded_later" in dir(sys.modules["__main__"]))).encode())
'''

async def main():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        children = file.read().split()
    assert len(children) == 1
    early = int(children[0])
    for f in (afork.Fork.new(), afork.Fork.new_exec(), afork.Fork.new_exec().fork()):
        parent, *loaded = eval(await answer(f.eval(ASK), "ask"))
        assert loaded == [False] * 3, loaded
        print(parent == early)
    # asked for another interpreter, it is executed
    f = afork.Fork.new_exec(python=sys.executable).eval(ASK)
    parent, *_ = eval(await answer(f, "ask"))
    print(parent == os.getpid())
asyncio.run(main())
"""
    )
    assert out.split() == ["True", "True", "False", "True"]


def test_signal_handlers_and_wakeup_of_the_program_are_its_own(program):
    out = program(
        """
import afork, signal, socket
a, b = socket.socketpair()
a.setblocking(False)
signal.set_wakeup_fd(a.fileno())
signal.signal(signal.SIGUSR1, print)
signal.signal(signal.SIGINT, print)
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
T = afork.fork_main()
signal.set_wakeup_fd(-1)
"""
        + TAIL
        + """
async def main():
    f = T.fork().eval('''
def ask(sock):
    import signal
    sock.sendall(repr((
        signal.set_wakeup_fd(-1),
        signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL,
        signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN,
        signal.getsignal(signal.SIGINT) is signal.default_int_handler)).encode())
''')
    print(await answer(f, "ask"))
asyncio.run(main())
a.close(); b.close()
"""
    )
    assert out == "(-1, True, True, True)\n"


def test_dies_with_the_program(tmp_path):
    from .scripts.api_ask import PYTHONPATH, ended

    (tmp_path / "prog.py").write_text(
        "import afork, signal\nT = afork.fork_main()\nprint(T.pid, flush=True)\nsignal.pause()\n"
    )
    app = subprocess.Popen(
        [sys.executable, str(tmp_path / "prog.py")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    pid = int(app.stdout.readline())
    assert os.getsid(pid) == pid
    app.kill()
    app.communicate()
    assert ended(pid)
