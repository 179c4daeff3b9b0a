"""What every test gets: guards against what it leaves behind, and ways to run."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

import afork._default

from .scripts.pool_tools import gate as gate
from .scripts.pool_tools import jobs as jobs

#: Seconds after which a test counts as hanging. Nothing is measured by it.
HANG = 10.0

SCRIPTS = Path(__file__).parent / "scripts"


def pytest_configure() -> None:
    # A shell makes what it starts with & ignore these, and so would all that
    # the tests start.
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGQUIT, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_report_header() -> str:
    return f"afork {afork.__version__} from {Path(afork.__file__).parent}"


def pytest_collection_finish() -> None:
    import hypothesis

    # It looks for who refers to its random generators, on its first use; who
    # is frozen cannot be seen.
    hypothesis.find(hypothesis.strategies.none(), lambda _: True)
    # The guard collects around every test: not what the suite itself consists of.
    gc.collect()
    gc.freeze()


def need(name: str, available: bool, why: str) -> None:
    """Skip unless something is there; fail if AFORK_REQUIRE names it (CI)."""
    if not available:
        if name in os.environ.get("AFORK_REQUIRE", "").split(","):
            pytest.fail(f"{name} is required here: {why}")
        pytest.skip(why)


# -- guards


def open_descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that listed them
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def children() -> set[int]:
    pids: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that is just ending
            pids.update(map(int, (task / "children").read_text().split()))
    return pids


def _settled(what: Callable[[], Any], before: Any) -> Any:
    """The state once it equals what was before, or after a second."""
    end = time.monotonic() + 1
    while (now := what()) != before and time.monotonic() < end:
        # A process that has been told to end needs a moment; there is nothing
        # left to wait on, as everything that knew of it has been closed.
        os.sched_yield()
    return now


@pytest.fixture(autouse=True)
def leak_guard() -> Iterator[None]:
    """Every test ends with the descriptors, children and threads it began with."""
    afork._default.shutdown()
    gc.collect()
    gc.freeze()  # reports pile up: the collections below need not walk them
    fds, kids = set(open_descriptors()), children()
    threads = set(threading.enumerate())
    yield
    gc.collect()
    afork._default.shutdown()
    gc.collect()
    left = {n: to for n, to in open_descriptors().items() if n not in fds}
    assert not left, f"descriptors left open: {left}"
    assert fds <= set(open_descriptors()), "descriptors closed that were not ours"
    # Of those before, one that was just ending may have gone meanwhile.
    new = _settled(lambda: children() - kids, set())
    assert not new, f"processes left behind: {new}"
    # asyncio's own threads that wait for its children end by themselves.
    now = _settled(lambda: set(threading.enumerate()), threads)
    assert now == threads, "threads left behind"


# -- running


Main = Callable[[], Coroutine[Any, Any, Any]]


def _loop_factories() -> list[Any]:
    params: list[Any] = [pytest.param(asyncio.new_event_loop, id="asyncio")]
    if importlib.util.find_spec("uvloop"):
        import uvloop

        # The first loop makes a pipe for signals that stays for good.
        uvloop.new_event_loop().close()
        params.append(pytest.param(uvloop.new_event_loop, id="uvloop"))
    elif "uvloop" in os.environ.get("AFORK_REQUIRE", "").split(","):
        raise RuntimeError("uvloop is required here")
    return params


@pytest.fixture(params=_loop_factories())
def loop_factory(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return request.param  # type: ignore[no-any-return]


async def bounded(main: Main) -> Any:
    async with asyncio.timeout(HANG):
        return await main()


@pytest.fixture
def arun(loop_factory: Callable[[], Any]) -> Callable[[Main], Any]:
    """Run an async function on a fresh loop, of each kind in turn; 10 s at most."""

    def run(main: Main) -> Any:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(bounded(main))

    return run


@pytest.fixture
def run_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run source text or a file of tests/scripts in a fresh interpreter.

    Fails with the whole output unless it ends with the expected status.
    """

    def run(
        script: str,
        *args: str,
        status: int = 0,
        flags: tuple[str, ...] = ("-W", "error"),
        **kwargs: Any,
    ) -> subprocess.CompletedProcess[str]:
        # Not from the working folder: it may hold the package unbuilt.
        source = ["-P", "-c", script]
        if "\n" not in script and (SCRIPTS / script).exists():
            source = [str(SCRIPTS / script)]
        done = subprocess.run(
            [sys.executable, *flags, *source, *args],
            capture_output=True,
            text=True,
            timeout=3 * HANG,
            **kwargs,
        )
        text = f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == status, text
        return done

    return run


@pytest.fixture(scope="session")
def perl() -> str:
    """A Perl with AnyEvent::Fork."""
    path = shutil.which("perl")
    found = (
        path is not None
        and not subprocess.run(
            [path, "-MAnyEvent::Fork", "-e", "1"], capture_output=True
        ).returncode
    )
    need("perl", found, "Perl's AnyEvent::Fork is not installed")
    assert path is not None
    return path


# -- conversations


async def read_all(sock: Any) -> bytes:
    """Everything that comes out of a socket until its end; closes it."""
    loop = asyncio.get_running_loop()
    data = b""
    try:
        while chunk := await loop.sock_recv(sock, 65536):
            data += chunk
    except ConnectionResetError:
        pass  # the peer ended with something of ours unread
    finally:
        sock.close()
    return data
