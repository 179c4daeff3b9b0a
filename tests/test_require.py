"""require: what the application can import, its processes can."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import venv
import zipapp
from pathlib import Path

import pytest

import afork

from .conftest import SCRIPTS
from .scripts.api_ask import PYTHONPATH, ask, read_all

PACKAGE = Path(afork.__file__).parent.parent


@pytest.fixture
def loop_factory():
    """What happens in the process is the same for every kind of loop."""
    return asyncio.new_event_loop


def test_binds_as_import_does(arun):
    async def main():
        f = afork.Fork.new().require("os.path", "xml.dom.minidom", "json")
        what = "(xml.dom.minidom.__name__, json.__name__, globals()['os'].__name__)"
        assert await ask(f, what) == ("xml.dom.minidom", "json", "os")

    arun(main)


def test_nothing_is_no_request():
    f = afork.Fork.new()
    assert f.require() is f
    f.close()


def test_wrong_arguments_are_raised_at_the_call():
    f = afork.Fork.new()
    with pytest.raises(TypeError, match="module name must be str, not bytes"):
        f.require(b"os")
    with pytest.raises(TypeError, match="module name must be str, not module"):
        f.require(os)
    with pytest.raises(ValueError, match="empty module name"):
        f.require("os", "")
    f.close()


def test_errors(arun, tmp_path, monkeypatch):
    (tmp_path / "api_broken.py").write_text("1 / 0\n")
    (tmp_path / "api_unparsable.py").write_text("x = (\n")
    (tmp_path / "api_exits.py").write_text("raise SystemExit('bye')\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    async def main():
        for name, kind, text in (
            ("api_missing", "ModuleNotFoundError", "No module named 'api_missing'"),
            ("os.nothing", "ModuleNotFoundError", "No module named 'os.nothing'"),
            ("api_broken", "ZeroDivisionError", "division by zero"),
            ("api_unparsable", "SyntaxError", "'(' was never closed"),
            ("api_exits", "SystemExit", "bye"),
        ):
            f = afork.Fork.new().require(name)
            with pytest.raises(afork.RemoteError) as info:
                await f.run("os.getpid")
            assert (info.value.stage, info.value.type) == ("require", kind)
            assert info.value.message.startswith(text)
        assert 'api_broken.py", line 1' in str(
            await _error(afork.Fork.new().require("api_broken"))
        )
        # the default template has loaded none of it
        assert await ask(afork.Fork.new(), "'api_broken' in sys.modules") is False

    arun(main)


async def _error(f):
    with pytest.raises(afork.RemoteError) as info:
        await f.ready()
    return info.value


def test_path_changed_later_is_known_to_later_requests(arun, tmp_path, monkeypatch):
    (tmp_path / "api_late.py").write_text("def f(sock): sock.sendall(b'late')\n")

    async def main():
        f = await afork.Fork.new().ready()
        template = await afork.Fork.new_exec().ready()
        monkeypatch.syspath_prepend(str(tmp_path))
        assert await read_all(await f.run("api_late.f")) == b"late"
        assert await read_all(await template.fork().run("api_late.f")) == b"late"
        assert await read_all(await afork.Fork.new().run("api_late.f")) == b"late"
        # taken away again
        monkeypatch.undo()
        with pytest.raises(afork.RemoteError, match="api_late"):
            await afork.Fork.new().run("api_late.f")

    arun(main)


def test_module_written_later_is_found(arun, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))

    async def main():
        f = afork.Fork.new()
        with pytest.raises(afork.RemoteError):
            await afork.Fork.new().require("api_young").ready()
        (tmp_path / "api_young.py").write_text("def f(sock): sock.sendall(b'young')\n")
        assert await read_all(await f.run("api_young.f")) == b"young"

    arun(main)


def test_namespace_package_over_two_folders(arun, tmp_path, monkeypatch):
    for part in ("one", "two"):
        (tmp_path / part / "api_spread").mkdir(parents=True)
        (tmp_path / part / "api_spread" / f"{part}.py").write_text(f"name = {part!r}\n")
        monkeypatch.syspath_prepend(str(tmp_path / part))

    async def main():
        f = afork.Fork.new().require("api_spread.one", "api_spread.two")
        names = "(api_spread.one.name, api_spread.two.name)"
        assert await ask(f, names) == ("one", "two")

    arun(main)


def test_module_inside_a_zip(arun, tmp_path, monkeypatch):
    import zipfile

    archive = tmp_path / "api.zip"
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("api_zipped.py", "def f(sock): sock.sendall(b'zipped')\n")
    monkeypatch.syspath_prepend(str(archive))

    async def main():
        assert await read_all(await afork.Fork.new().run("api_zipped.f")) == b"zipped"

    arun(main)


def test_empty_entry_means_our_directory(arun, tmp_path, monkeypatch):
    (tmp_path / "api_here.py").write_text("def f(sock): sock.sendall(b'here')\n")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.chdir(tmp_path)

    async def main():
        f = afork.Fork.new().set(cwd="/")
        assert await read_all(await f.run("api_here.f")) == b"here"
        # and follows us
        os.chdir("/")
        with pytest.raises(afork.RemoteError, match="api_here"):
            await afork.Fork.new().run("api_here.f")

    arun(main)


def test_working_directory_that_is_gone(run_script, tmp_path):
    """'' in sys.path, as python -c has it, must not stand in the way."""
    gone = tmp_path / "gone"
    gone.mkdir()
    done = run_script(
        """
import asyncio, os, sys
import afork
from tests.scripts.api_ask import ask
os.rmdir(os.getcwd())
async def main():
    sys.path.insert(0, "")
    print(await ask(afork.Fork.new(), "'' in sys.path"))
asyncio.run(main())
""",
        cwd=gone,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    assert done.stdout == "False\n"


def test_path_is_the_applications_in_order(arun):
    async def main():
        expected = [os.path.abspath(p) for p in sys.path]
        assert await ask(afork.Fork.new(), "sys.path") == expected
        assert await ask(afork.Fork.new_exec(), "sys.path") == expected

    arun(main)


MAIN = """
import asyncio, sys
import afork
from tests_api_worker import work

async def main():
    for f in (afork.Fork.new(), afork.Fork.new_exec().fork()):
        sock = await f.run(work)
        print((await asyncio.get_running_loop().sock_recv(sock, 999)).decode())
        sock.close()

if __name__ == "__main__":
    asyncio.run(main())
"""
WORKER = "def work(sock, *args): sock.sendall(__name__.encode())\n"


def test_zipapp(tmp_path, run_script):
    source = tmp_path / "app"
    source.mkdir()
    (source / "__main__.py").write_text(MAIN)
    (source / "tests_api_worker.py").write_text(WORKER)
    zipapp.create_archive(source, tmp_path / "app.pyz")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(tmp_path / "app.pyz")],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    assert (done.stdout, done.stderr) == ("tests_api_worker\n" * 2, "")


def test_virtual_environment(tmp_path):
    env = tmp_path / "env"
    venv.create(env, with_pip=False, symlinks=True)
    (site,) = env.glob("lib/python*/site-packages")
    (site / "elsewhere.pth").write_text(f"{PACKAGE}\n{tmp_path}\n")
    (tmp_path / "tests_api_worker.py").write_text(
        "import sys\n"
        "def work(sock):\n"
        "    here = (sys.prefix, sys.exec_prefix, sys.base_prefix == sys.prefix)\n"
        "    sock.sendall(repr(here).encode())\n"
    )
    (tmp_path / "main.py").write_text(MAIN)
    done = subprocess.run(
        [str(env / "bin" / "python"), "-W", "error", str(tmp_path / "main.py")],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.stdout, done.stderr) == (f"{(str(env), str(env), False)}\n" * 2, "")


def test_finder_installed_by_a_pth_file(tmp_path):
    """An editable install of the kind that setuptools makes of a src layout."""
    env, source = tmp_path / "env", tmp_path / "somewhere"
    venv.create(env, with_pip=False, symlinks=True)
    (site,) = env.glob("lib/python*/site-packages")
    (site / "a.pth").write_text(f"{PACKAGE}\n")
    (site / "__editable___finder.py").write_text(
        (SCRIPTS / "api_editable_finder.py")
        .read_text()
        .replace("SOURCE", repr(str(source)))
    )
    (site / "__editable__.pth").write_text(
        "import __editable___finder; __editable___finder.install()\n"
    )
    source.mkdir()
    (source / "tests_api_worker.py").write_text(WORKER)
    (tmp_path / "main.py").write_text(MAIN)
    done = subprocess.run(
        [str(env / "bin" / "python"), "-W", "error", str(tmp_path / "main.py")],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.stdout, done.stderr) == ("tests_api_worker\n" * 2, "")


def test_without_hooks_site_is_not_processed(run_script):
    done = run_script(
        """
import asyncio, sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in str(f)]
import afork
from tests.scripts.api_ask import ask
async def main():
    print(await ask(afork.Fork.new(), "'sitecustomize' in sys.modules"))
asyncio.run(main())
""",
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    assert done.stdout == "False\n"


def test_interpreter_flags_are_ours(run_script):
    done = run_script(
        """
import asyncio, sys
import afork
from tests.scripts.api_ask import ask
async def main():
    print(await ask(afork.Fork.new(), "(sys.flags.optimize, sys.flags.utf8_mode, bool(sys.flags.dont_write_bytecode), sys.warnoptions, sys.flags.isolated)"))
asyncio.run(main())
""",
        flags=("-OO", "-B", "-X", "utf8", "-W", "error::UserWarning"),
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    assert done.stdout == "(2, 1, True, ['error::UserWarning'], 1)\n"
