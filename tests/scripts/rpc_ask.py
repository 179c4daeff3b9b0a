"""Calls of the functions in rpc_jobs.py, for tests."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import afork


@pytest.fixture(autouse=True)
def jobs(monkeypatch):
    """The module rpc_jobs can be imported, here and there."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def rpc(name, **options):
    return afork.Fork.new().rpc(f"rpc_jobs.{name}", **options)


class Events(asyncio.Queue):
    """The events of a process, in order."""

    def __call__(self, event):
        self.put_nowait(event)

    def all(self):
        found = []
        while not self.empty():
            found.append(self.get_nowait().args)
        return found
