"""CPython's own structures when everything that a template has is immortal.

A part of CPython's test suite runs in workers of a frozen template, with the
tests themselves among the frozen objects.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from .conftest import SCRIPTS, need
from .scripts.api_ask import PYTHONPATH

#: What is different by design. Once a worker has thawed its objects
#: (gc.unfreeze is what an earlier test calls), a collection of 3.14 takes what is
#: immortal out of the collector's books.
EXPECTED = {
    "test_is_tracked (test.test_gc.GCTests.test_is_tracked)",
    "test_get_referents_on_capsule (test.test_gc.GCTests.test_get_referents_on_capsule)",
}


PARTS = 6  # each shorter than what the suite takes for a hang


@pytest.mark.parametrize("part", range(PARTS))
def test_cpython_tests_in_frozen_workers(tmp_path, part):
    found = not subprocess.run(
        [sys.executable, "-c", "import test.test_dict, test.test_descr"],
        capture_output=True,
    ).returncode
    need("cpython", found, "this Python comes without its tests")
    if sys.version_info < (3, 12):
        pytest.skip("no immortal objects")
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "cpython_suite.py"), str(part), str(PARTS)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": PYTHONPATH},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    worse = {test for tests in result["worse"].values() for test in tests}
    assert worse <= EXPECTED, result["worse"]
    assert result["tests"] > 500
