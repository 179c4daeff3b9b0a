"""Compile src/core, as it is, for the tests: a cffi module and C programs.

Nothing is written into the source tree: the results live in a folder under the
temporary directory whose name is a hash of everything that went into them.

    AFORK_SRC=DIR       where src/ is, when the tests were copied elsewhere
    AFORK_SANITIZE=1    with ASan and UBSan; then also set
                        LD_PRELOAD="$(cc -print-file-name=libasan.so)"
                        ASAN_OPTIONS=detect_leaks=0
"""

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import cffi

HERE = Path(__file__).resolve().parent
CC = shlex.split(os.environ.get("CC", "cc"))
SANITIZE = os.environ.get("AFORK_SANITIZE") == "1"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

BASE_FLAGS = ["-std=c11", "-g", "-O1", "-fPIC", "-fno-omit-frame-pointer"]
BASE_FLAGS += SANITIZERS if SANITIZE else []
STRICT = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]

# Calls of src/core that go through shim.c, which counts them and lets them fail.
WRAPPED = ["sendmsg", "recvmsg", "poll", "ppoll", "syscall"]
WRAPPED += ["malloc", "calloc", "realloc"]
WRAP_FLAGS = [f"-Wl,--wrap={name}" for name in WRAPPED]

MODULE = "_afork_core"
KEEP_SECONDS = 24 * 3600


def source_dir() -> Path:
    """Return the folder src/, which holds core/ and binding/."""
    given = os.environ.get("AFORK_SRC")
    path = Path(given).resolve() if given else HERE.parents[1] / "src"
    if not (path / "core" / "base.h").is_file():
        raise FileNotFoundError(f"no core/base.h in {path}; set AFORK_SRC to src/")
    return path


CORE = source_dir() / "core"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def _inputs() -> list[Path]:
    ours = [*HERE.glob("*.[ch]"), *HERE.glob("*.cdef"), *HERE.glob("build_core.py")]
    ours += (HERE.parent / "fuzz").glob("*.[ch]")
    return sorted([*CORE.glob("*.[ch]"), *ours])


@cache
def build_dir() -> Path:
    version = subprocess.run([*CC, "--version"], capture_output=True, check=True)
    digest = hashlib.sha256(version.stdout)
    key = [sys.version, sys.prefix, cffi.__version__, *CC, *BASE_FLAGS, *STRICT]
    digest.update(repr(key).encode())
    for path in _inputs():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")

    base = Path(tempfile.gettempdir()) / f"afork-tests-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    info = base.lstat()
    if info.st_uid != os.getuid() or info.st_mode & 0o022 or base.is_symlink():
        raise PermissionError(f"{base} belongs to somebody else")
    for old in base.iterdir():
        if old.stat().st_mtime < time.time() - KEEP_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    path = base / digest.hexdigest()[:20]
    path.mkdir(exist_ok=True)
    os.utime(path)
    return path


def _make(name: str, command: list[str]) -> Path:
    """Run a compiler unless its output is there; two at a time do no harm."""
    target = build_dir() / name
    if not target.exists():
        fresh = target.with_name(f"{os.getpid()}-{name}")
        _run([*command, "-o", str(fresh)])
        fresh.replace(target)
    return target


def _object(source: Path, prefix: str, *flags: str) -> Path:
    command = [*CC, *BASE_FLAGS, *flags, f"-I{CORE}", "-c", str(source)]
    return _make(f"{prefix}-{source.stem}.o", command)


@cache
def core_objects() -> tuple[str, ...]:
    sources = sorted(CORE.glob("*.c"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(lambda source: _object(source, "core", *STRICT), sources)
        return tuple(str(path) for path in done)


def shim_object() -> str:
    return str(_object(HERE / "shim.c", "test", *STRICT))


@cache
def module_path() -> Path:
    """Build the cffi module; its cdef is checked against the real headers."""
    cdef = (HERE / "core.cdef").read_text()
    headers = "".join(f'#include "{p.name}"\n' for p in sorted(CORE.glob("*.h")))
    builder = cffi.FFI()
    builder.cdef(cdef)
    builder.set_source(MODULE, f'#define _GNU_SOURCE\n{headers}#include "shim.h"\n')
    text = build_dir() / f"{os.getpid()}-{MODULE}.c"
    builder.emit_c_code(str(text))
    text = text.replace(build_dir() / f"{MODULE}.c")

    include = f"-I{sysconfig.get_path('include')}"
    main = _object(text, "cffi", include, f"-I{HERE}", "-Wno-unused")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    objects = [str(main), *core_objects(), shim_object()]
    return _make(MODULE + suffix, [*CC, *BASE_FLAGS, "-shared", *WRAP_FLAGS, *objects])


def load(path: Path | str | None = None):
    """Import the cffi module: it has .ffi and .lib."""
    spec = importlib.util.spec_from_file_location(MODULE, path or module_path())
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def program(name: str) -> str:
    """Build tests/core/NAME.c with the core and the shim; return its path."""
    main = str(_object(HERE / f"{name}.c", "test", *STRICT))
    objects = [main, shim_object(), *core_objects()]
    return str(_make(name, [*CC, *BASE_FLAGS, *WRAP_FLAGS, *objects]))


@cache
def plain_program(name: str) -> str:
    """Build tests/core/NAME.c alone: no core, no shim, no sanitizer."""
    source = str(HERE / f"{name}.c")
    return str(_make(name, [*CC, "-std=c11", "-O1", *STRICT, source]))


@cache
def replay_program(harness: Path) -> str:
    """Build a libFuzzer harness with a main() that replays files instead."""
    main = _object(harness, "fuzz", *STRICT)
    replay = _object(HERE / "replay.c", "fuzz", *STRICT)
    objects = [str(main), str(replay), *core_objects()]
    return str(_make(f"replay-{harness.stem}", [*CC, *BASE_FLAGS, *objects]))
