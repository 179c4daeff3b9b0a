"""Interpreters on which no object can be made immortal: they are left alone.

The file that knows the layout is compiled as it would be for them, and called
in this interpreter.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from .conftest import need

SOURCE = Path(__file__).parents[1] / "src" / "binding" / "freeze.c"

FREE_THREADED = "#undef Py_GIL_DISABLED\n#define Py_GIL_DISABLED 1\n"
CASES = {
    "free-threaded Python": FREE_THREADED,
    "Python that traces references": "#define Py_TRACE_REFS 1\n",
    "32-bit Python": "#undef SIZEOF_VOID_P\n#define SIZEOF_VOID_P 4\n",
    "Python before 3.12": "#undef PY_VERSION_HEX\n#define PY_VERSION_HEX 0x030B00F0\n",
    "unknown Python version": "#undef PY_VERSION_HEX\n"
    "#define PY_VERSION_HEX 0x031000A0\n",
    # Headers of another build: its count says nothing to the one that runs.
    "Python does not agree": "#undef _Py_IMMORTAL_REFCNT\n"
    "#define _Py_IMMORTAL_REFCNT 5\n"
    "#undef _Py_IMMORTAL_FLAGS\n#define _Py_IMMORTAL_FLAGS 0\n"
    "#undef _Py_IMMORTAL_INITIAL_REFCNT\n#define _Py_IMMORTAL_INITIAL_REFCNT 5\n",
}


@pytest.mark.parametrize("why", CASES)
def test_nothing_is_changed(tmp_path, why):
    compiler = shutil.which("cc")
    include = sysconfig.get_path("include")
    possible = compiler is not None and (Path(include) / "Python.h").exists()
    need("compiler", possible and SOURCE.exists(), "nothing to compile with")
    if why == "Python does not agree" and sys.version_info < (3, 12):
        pytest.skip("refused before it is asked")
    wrapper = tmp_path / "wrapper.c"
    wrapper.write_text(
        f"#define PY_SSIZE_T_CLEAN\n#include <Python.h>\n{CASES[why]}"
        f'#include "{SOURCE}"\n'
    )
    library = tmp_path / "wrapper.so"
    core = SOURCE.parents[1] / "core"
    command = [compiler, "-shared", "-fPIC", "-w", f"-I{include}", f"-I{core}"]
    command += [f"-I{SOURCE.parent}", "-o", str(library), str(wrapper)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.PyDLL(str(library))
    loaded.binding_immortal_refused.restype = ctypes.c_char_p
    loaded.binding_immortalise.restype = ctypes.c_ssize_t
    visited = ctypes.c_ssize_t(-1)
    loaded.binding_immortalise.argtypes = [
        ctypes.py_object,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_ssize_t),
    ]
    mine = ["a string of its own" * 2, [1.5]]
    before = [sys.getrefcount(x) for x in mine]
    for only_new in (0, 1):
        assert loaded.binding_immortal_refused() == why.encode()
        assert loaded.binding_immortalise([mine], None, only_new, visited) == 0
        assert visited.value == 0
    assert [sys.getrefcount(x) for x in mine] == before
