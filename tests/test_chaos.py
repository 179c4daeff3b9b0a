"""Everything at once, while processes die and descriptors run out, at random.

AFORK_CHAOS_SECONDS makes it longer (with pytest -o faulthandler_timeout=0),
AFORK_CHAOS_SEED repeats a choice of things to do, not their timing. See
scripts/chaos.py and chaos_app.py.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest

from .conftest import HANG, SCRIPTS, need


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_every_call_ends_and_nothing_is_left(loop):
    if loop == "uvloop":
        need("uvloop", _has_uvloop(), "uvloop is not installed")
    seconds = float(os.environ.get("AFORK_CHAOS_SECONDS", "3"))
    seed = int(os.environ.get("AFORK_CHAOS_SEED", random.randrange(1 << 32)))
    print("seed", seed)
    done = subprocess.run(
        [sys.executable, SCRIPTS / "chaos.py", str(seed), str(seconds), loop],
        capture_output=True,
        text=True,
        timeout=seconds + 9 * HANG,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-10_000:]}"
    assert "over" in done.stdout


def _has_uvloop() -> bool:
    import importlib.util

    return importlib.util.find_spec("uvloop") is not None
