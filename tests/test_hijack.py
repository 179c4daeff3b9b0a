"""Start-up hijack: no foreign line runs before the application's path arrives.

Every place that an interpreter might execute something from at its start is
filled with files that leave a mark.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import afork

from .scripts.api_ask import PYTHONPATH, ROOT

PACKAGE = Path(afork.__file__).parent.parent

#: What a starting interpreter, or one of our own modules, imports first.
NAMES = [
    "__future__",
    "_collections_abc",
    "_sitebuiltins",
    "_weakrefset",
    "abc",
    "afork",
    "array",
    "atexit",
    "codecs",
    "collections",
    "concurrent",
    "contextlib",
    "copyreg",
    "ctypes",
    "encodings",
    "enum",
    "errno",
    "functools",
    "genericpath",
    "importlib",
    "io",
    "itertools",
    "json",
    "keyword",
    "linecache",
    "locale",
    "math",
    "operator",
    "os",
    "pickle",
    "posixpath",
    "re",
    "reprlib",
    "resource",
    "runpy",
    "select",
    "selectors",
    "signal",
    "site",
    "sitecustomize",
    "socket",
    "ssl",
    "stat",
    "struct",
    "subprocess",
    "sys",
    "sysconfig",
    "tempfile",
    "textwrap",
    "threading",
    "time",
    "token",
    "tokenize",
    "traceback",
    "types",
    "typing",
    "usercustomize",
    "warnings",
    "weakref",
    "zipimport",
]


@pytest.fixture
def trap(tmp_path):
    """A folder of modules that leave a mark, and the folder of the marks."""
    folder, marks = tmp_path / "trap", tmp_path / "marks"
    folder.mkdir()
    marks.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(mark(marks, name))
    return folder, marks


def mark(marks: Path, name: str) -> str:
    return f"import posix\nposix.close(posix.open({str(marks / name)!r}, 64))\n"


APPLICATION = """
import asyncio, os, sys
HOW = sys.argv[1]
sys.path[:] = [p for p in sys.path if p not in ("", sys.argv[2])]
sys.path.insert(0, PACKAGE)
sys.path.append(ROOT)
import afork
from tests.scripts.api_ask import ask
import decimal, json, logging, pickle, signal, threading, traceback, concurrent.futures
import importlib.util, linecache, runpy, ctypes, resource, copy, textwrap

PREPARE

async def main():
    for f in (afork.Fork.new(), afork.Fork.new_exec().fork()):
        print(await ask(f, "(os.getcwd(), sys.path[0])"))
        assert await f.wait() == 0
    f = afork.Fork.new()
    assert await f.exec("true") is None
    assert await f.wait() == 0
asyncio.run(main())
"""


def run(trap, prepare: str = "", flags=("-I",), **env: str) -> None:
    """Run the application in the trap; nothing may spring it."""
    folder, marks = trap
    source = (
        APPLICATION.replace("PACKAGE", repr(str(PACKAGE)))
        .replace("ROOT", repr(str(ROOT)))
        .replace("PREPARE", prepare)
    )
    done = subprocess.run(
        [sys.executable, *flags, "-c", source, "", str(folder)],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=folder,
        env={**os.environ, **env},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{(str(folder), str(PACKAGE))}\n" * 2
    assert sorted(x.name for x in marks.iterdir()) == []


def test_the_trap_works(trap):
    """A test that cannot fail is none: a usual interpreter steps into it."""
    folder, marks = trap
    subprocess.run(
        [sys.executable, "-c", "import os, afork"],
        capture_output=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )
    # and gets no further than its first import
    assert "encodings" in [x.name for x in marks.iterdir()]


def test_working_directory(trap):
    run(trap)


def test_environment(trap):
    folder, marks = trap
    startup = folder / "startup"
    startup.write_text(mark(marks, "PYTHONSTARTUP"))
    run(
        trap,
        PYTHONPATH=str(folder),
        PYTHONSTARTUP=str(startup),
        PYTHONINSPECT="1",
        PYTHONBREAKPOINT="sitecustomize.x",
        PYTHONWARNINGS="error::sitecustomize.W",
        PYTHONCASEOK="1",
    )


def test_home(trap):
    """PYTHONHOME of the application's environment is not the template's."""
    folder, _ = trap
    run(trap, prepare=f"os.environ['PYTHONHOME'] = {str(folder)!r}")
    run(trap, prepare=f"os.environ['PYTHONPATH'] = {str(folder)!r}")


def test_user_site(trap):
    folder, marks = trap
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    user = folder / "home" / "lib" / version / "site-packages"
    user.mkdir(parents=True)
    (user / "usercustomize.py").write_text(mark(marks, "user site"))
    (user / "trap.pth").write_text(
        f"import posix; posix.open({str(marks / 'user pth')!r}, 64)\n"
    )
    run(trap, PYTHONUSERBASE=str(folder / "home"), HOME=str(folder / "home"))


def test_pth_and_sitecustomize_of_a_virtual_environment(trap, tmp_path):
    import venv

    folder, marks = trap
    env = tmp_path / "env"
    venv.create(env, with_pip=False, symlinks=True)
    (site,) = env.glob("lib/python*/site-packages")
    (site / "sitecustomize.py").write_text(mark(marks, "sitecustomize"))
    (site / "trap.pth").write_text(
        f"import posix; posix.open({str(marks / 'pth')!r}, 64)\n"
    )
    source = (
        APPLICATION.replace("PACKAGE", repr(str(PACKAGE)))
        .replace("ROOT", repr(str(ROOT)))
        .replace(
            "PREPARE",
            f"[os.unlink(e) for e in os.scandir({str(marks)!r})]  # the application's own",
        )
    )
    done = subprocess.run(
        [str(env / "bin" / "python"), "-c", source, "", str(folder)],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(x.name for x in marks.iterdir()) == []


def test_interpreter_behind_symbolic_links(trap, tmp_path):
    """A link in a folder that looks like an installation is no installation."""
    _, marks = trap
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    fake = tmp_path / "fake"
    (fake / "bin").mkdir(parents=True)
    (fake / "bin" / "python3").symlink_to(os.path.realpath(sys.executable))
    lib = fake / "lib" / version / "site-packages"
    lib.mkdir(parents=True)
    (lib / "sitecustomize.py").write_text(mark(marks, "fake site"))
    run(trap, prepare=f"sys.executable = {str(fake / 'bin' / 'python3')!r}")


@pytest.mark.parametrize("executable", ["''", "None", "'/usr/bin/vim'", "sys.argv[0]"])
def test_without_a_usable_sys_executable(trap, executable):
    run(trap, prepare=f"sys.executable = sys._base_executable = {executable}")


def test_path_search_finds_no_other_python(trap):
    """No name of an interpreter is looked for in PATH."""
    folder, marks = trap
    for name in ("python", "python3", f"python3.{sys.version_info.minor}"):
        (folder / name).write_text(f"#!/bin/sh\n: > {marks}/{name}\nexit 1\n")
        (folder / name).chmod(0o755)
    run(
        trap,
        prepare="sys.executable = sys._base_executable = ''",
        PATH=f"{folder}:/usr/bin:/bin",
    )


def test_modules_of_the_applications_path_are_its_own(tmp_path, run_script):
    """The path decides once it has arrived: even a module named as ours is."""
    (tmp_path / "statistics.py").write_text("mine = 1\n")
    done = run_script(
        f"""
import asyncio, sys
sys.path.insert(0, {str(tmp_path)!r})
import afork
from tests.scripts.api_ask import ask
async def main():
    f = afork.Fork.new().require("statistics")
    print(await ask(f, "statistics.mine"))
asyncio.run(main())
""",
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    assert done.stdout == "1\n"
