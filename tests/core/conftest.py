"""Fixtures of the core tests: src/core behind cffi, and programs made of it."""

import contextlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from . import build_core
from .server import Server

HERE = Path(__file__).resolve().parent

PRELUDE = """\
import os, sys
sys.path.insert(0, {here!r})
sys.dont_write_bytecode = True
import importlib.util
spec = importlib.util.spec_from_file_location("_afork_core", {module!r})
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
ffi, lib = core.ffi, core.lib
from reference import *
"""


@pytest.fixture(scope="session")
def build():
    return build_core


@pytest.fixture(scope="session")
def core(build):
    return build.load()


@pytest.fixture(scope="session")
def ffi(core):
    return core.ffi


@pytest.fixture(scope="session")
def lib(core):
    return core.lib


@pytest.fixture(autouse=True)
def _no_faults(request):
    """What a test asked the shim for ends with it."""
    yield
    if "lib" in request.fixturenames:
        request.getfixturevalue("lib").shim_reset()


@pytest.fixture(scope="session")
def script(build):
    """Run Python source in a fresh interpreter that has ffi and lib."""
    prelude = PRELUDE.format(here=str(HERE), module=str(build.module_path()))

    def run(source: str, *args: str, returncode: int = 0, **more) -> str:
        done = subprocess.run(
            [sys.executable, "-c", prelude + textwrap.dedent(source), *args],
            capture_output=True,
            text=True,
            timeout=40,
            **more,
        )
        assert done.returncode == returncode, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def probe(build) -> str:
    return build.plain_program("probe")


@pytest.fixture(scope="session")
def stub_server(build) -> str:
    return build.program("stub_server")


@pytest.fixture
def serve(stub_server):
    with contextlib.ExitStack() as stack:
        yield lambda flags="": stack.enter_context(Server(stub_server, flags))


@pytest.fixture
def server(serve):
    return serve()


@pytest.fixture
def started(server):
    server.expect("STARTED")
    return server
