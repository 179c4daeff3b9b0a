"""What the tests of executors call: imported by the tests and by the processes."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor

import afork
import afork._default

kept: list[object] = []


def nested(n, keep=False):
    """An executor in a process of another one; perhaps left for its end."""
    executor = afork.Executor(2)
    values = list(executor.map(abs, range(-n, 0)))
    pids = [*executor._pool.stats().pids, executor._pool._core.template.get().pid]
    pids.append(afork._default.default_template().pid)
    if keep:
        kept.append(executor)
    else:
        executor.shutdown()
    return values, pids


def is_loaded(name):
    return name in sys.modules


class Tracked:
    """An argument or result that can be referred to weakly."""


def track(what):
    return what


def standard(n):
    """The standard library's, in a process of ours."""
    with ProcessPoolExecutor(1) as executor:
        return executor.submit(pow, n, 2).result(), os.getpid()
