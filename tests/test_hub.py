"""The hub: what it waits for."""

from __future__ import annotations


def test_waits_for_any_descriptor(run_script):
    """select(2) takes none above 1023."""
    run_script(
        """
import os, resource
from afork._hub import hub

soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2048), hard))
fds = [os.dup(0)]
while fds[-1] < 1024:
    fds.append(os.dup(0))
assert hub().fileno() > 1023
hub().wait(0)
"""
    )
