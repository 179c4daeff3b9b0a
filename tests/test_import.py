"""What importing costs, what is exported, what a template has loaded."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import afork
from afork import _afork

from .conftest import need
from .scripts.api_ask import PYTHONPATH, ROOT, ask

PACKAGE = Path(afork.__file__).parent.parent


def test_import_has_no_side_effects(run_script):
    done = run_script(
        """
import os, signal, sys, threading
def state():
    return (
        [os.path.realpath(f"/proc/self/fd/{n}") for n in sorted(os.listdir("/proc/self/fd"))[:-1]],
        os.listdir("/proc/self/task"), threading.enumerate(),
        [signal.getsignal(n) for n in range(1, 65)], sys.meta_path[:], sys.path[:],
        dict(os.environ), sys.gettrace(), sys.excepthook,
        open(f"/proc/self/task/{os.getpid()}/children").read(),
    )
before, modules = state(), set(sys.modules)
import afork
assert state() == before
print(sorted(set(sys.modules) - modules - {"typing", "collections", "functools"}))
""",
        flags=(),
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    names = set(eval(done.stdout))
    assert {"afork", "afork._version"} <= names
    assert not names & {"asyncio", "socket", "subprocess", "logging", "afork._afork"}


def test_names_are_lazy(run_script):
    done = run_script(
        """
import sys
import afork
assert "asyncio" not in sys.modules
assert "Fork" not in vars(afork)
afork.RemoteError, afork.SOCKET, afork.Handle
assert "asyncio" not in sys.modules
assert set(afork.__all__) <= set(dir(afork))
for name in afork.__all__:
    getattr(afork, name)
assert "Fork" in vars(afork)
from afork import *
Fork, DEVNULL, TemplateError
try:
    afork.nothing
except AttributeError as exc:
    print(exc)
""",
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    assert done.stdout == "module 'afork' has no attribute 'nothing'\n"


def test_all_is_sorted_and_complete():
    assert afork.__all__ == sorted(afork.__all__)
    assert len(set(afork.__all__)) == len(afork.__all__)
    assert {
        "AforkError",
        "ClosedError",
        "DEVNULL",
        "Fork",
        "Handle",
        "ProtocolError",
        "RemoteError",
        "SOCKET",
        "STDOUT",
        "TemplateError",
        "WorkerLost",
        "create_subprocess_exec",
        "create_subprocess_shell",
        "fork_main",
        "python",
    } <= set(afork.__all__)
    assert afork.python is None
    assert afork.__version__.count(".") >= 1


def test_every_public_name_has_a_docstring():
    for name in afork.__all__:
        value = getattr(afork, name)
        if callable(value):
            assert value.__doc__, name
            if isinstance(value, type):
                for attribute, member in vars(value).items():
                    if not attribute.startswith("_") and callable(member):
                        assert member.__doc__, f"{name}.{attribute}"


def test_extension_exports_one_symbol():
    need("nm", shutil.which("nm") is not None, "nm is not installed")
    out = subprocess.run(
        ["nm", "-D", "--defined-only", _afork.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = [line.split()[-1] for line in out.splitlines()]
    assert [n for n in names if n not in ("_init", "_fini")] == ["PyInit__afork"]


ERRORS = [
    afork.AforkError("text"),
    afork.ProtocolError("text"),
    afork.ClosedError("text"),
    afork.TemplateError("text", 12, 9),
    afork.TemplateError("text"),
    afork.WorkerLost("text", 12, 256),
    afork.WorkerLost("text", 12),
    afork.RemoteError("eval", "ValueError", "message", "Traceback\n"),
    afork.RemoteError("eval", "ValueError", ""),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_errors_can_be_pickled_and_copied(error):
    error.add_note("a note")
    for other in (
        *(pickle.loads(pickle.dumps(error, n)) for n in range(6)),
        copy.copy(error),
        copy.deepcopy(error),
    ):
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert other.args == error.args
        assert vars(other) == vars(error)


def test_hierarchy_and_text_of_errors():
    for name in (
        "ProtocolError",
        "TemplateError",
        "ClosedError",
        "RemoteError",
        "WorkerLost",
    ):
        assert issubclass(getattr(afork, name), afork.AforkError)
    assert issubclass(afork.AforkError, Exception)
    assert str(ERRORS[3]) == "text (pid 12, killed by SIGKILL)"
    assert str(ERRORS[4]) == "text"
    assert str(ERRORS[5]) == "text (pid 12, exit status 1)"
    assert str(ERRORS[6]) == "text (pid 12, status unknown)"
    assert str(afork.WorkerLost("text", 1, 63)) == "text (pid 1, killed by signal 63)"
    assert str(ERRORS[7]) == (
        "eval: ValueError: message\n\nIn the process:\n  Traceback"
    )
    assert str(ERRORS[8]) == "eval: ValueError"


#: What an empty template may have loaded beyond what every interpreter has.
#: A module more is paid for by every worker: change this list with a reason.
GOLDEN = {
    "__future__",
    "_abc",  # until 3.13 every interpreter had these four
    "_types",
    "abc",
    "io",
    "_collections",
    "_collections_abc",
    "_functools",
    "_operator",
    "_sitebuiltins",
    "_socket",
    "_stat",
    "atexit",
    "errno",
    "genericpath",
    "gc",
    "os",
    "os.path",
    "posixpath",
    "site",
    "stat",
}

#: Each of these costs every fork a hook, or every worker its memory.
HEAVY = {
    "asyncio",
    "concurrent.futures",
    "contextlib",
    "dataclasses",
    "inspect",
    "logging",
    "multiprocessing",
    "random",
    "re",
    "ssl",
    "subprocess",
    "tempfile",
    "threading",
    "traceback",
}


def test_modules_of_an_empty_template(run_script):
    """In a fresh application: what pytest has loaded does not count."""
    done = run_script(
        """
import asyncio, sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in str(f)]
import afork
async def main():
    f = afork.Fork.new().eval('''
import sys
names = sorted(sys.modules)
def tell(sock): sock.sendall(repr(names).encode())
''')
    sock = await f.run("tell")
    print((await asyncio.get_running_loop().sock_recv(sock, 99999)).decode())
    sock.close()
asyncio.run(main())
""",
        flags=(),
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    names = set(eval(done.stdout))
    bare = subprocess.run(
        [sys.executable, "-ISc", "import sys; print(sorted(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    more = names - set(eval(bare.stdout))
    more = {n for n in more if n != "afork" and not n.startswith("afork.")}
    assert not names & HEAVY
    assert more <= GOLDEN, f"new in every worker: {sorted(more - GOLDEN)}"
    ours = {n for n in names if n.startswith("afork.")}
    assert ours == {
        "afork._afork",
        "afork._atfork",
        "afork._child",
        "afork._handles",
        "afork._memory",
        "afork._version",
        "afork._worker_socket",
    }


def test_no_fork_hooks_in_an_empty_worker(arun):
    async def main():
        assert await ask(afork.Fork.new_exec(), "'threading' in sys.modules") is False

    arun(main)


def test_one_fork_and_one_vfork_in_the_tree():
    import re

    source = ROOT / "src"
    text = "\n".join(path.read_text() for path in sorted(source.rglob("*.c")))
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    assert len(re.findall(r"= fork\(\)", text)) == 1
    assert len(re.findall(r"= vfork\(\)", text)) == 1
    python = "\n".join(p.read_text() for p in (ROOT / "afork").glob("*.py"))
    assert "os.fork(" not in python


def test_core_does_not_know_python():
    import re

    source = ROOT / "src" / "core"
    for path in source.iterdir():
        assert not re.search(r"#\s*include\s*[<\"]Python.h", path.read_text()), path
