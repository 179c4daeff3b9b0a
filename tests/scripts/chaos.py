"""Chaos around an application: ``chaos.py SEED SECONDS [uvloop]``.

Starts chaos_app.py and, while that works, does to it what machines do: kills,
stops and continues any process below it, ends its sockets, takes descriptors
away. As a subreaper it is also where orphans end up, and sees who stays.
Exits with the application's status, or 1 if a process outlives it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

HANG = 10.0
GETFD = 438  # pidfd_getfd(2)

libc = ctypes.CDLL(None, use_errno=True)


def children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += map(int, (task / "children").read_text().split())
    return found


def below(pid: int) -> list[int]:
    found = children(pid)
    for child in found:
        found += children(child)
    return found


def reap() -> list[int]:
    """Take the status of orphans; who is left."""
    mine = children(os.getpid())
    for pid in mine:
        if pid != app.pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
    return [pid for pid in children(os.getpid()) if pid != app.pid]


class Party:
    """Does one thing after the other to the processes below pid."""

    def __init__(self, pid: int, seed: int, spared: set[str]) -> None:
        self.pid = pid
        self.rng = random.Random(seed)
        self.spared = spared  # sockets, by what readlink says
        self.late: list[tuple[float, int, object]] = []
        self.done: Counter[str] = Counter()
        self.limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)

    def victim(self) -> tuple[int, int] | None:
        """Somebody below, as (pid, pidfd)."""
        # Orphans are below us, and as good as others.
        found = [*below(self.pid), *(p for p in below(os.getpid()) if p != self.pid)]
        if not found:
            return None
        pid = self.rng.choice(found)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return None
        if pid not in below(os.getpid()):  # the number may be another's by now
            os.close(pidfd)
            return None
        return pid, pidfd

    def after(self, seconds: float, what: object, *args: object) -> None:
        self.late.append((time.monotonic() + seconds, len(self.done), (what, *args)))

    def send(self, number: int, pidfd: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)

    def cont(self, pidfd: int) -> None:
        self.send(signal.SIGCONT, pidfd)
        os.close(pidfd)

    def limit(self, pidfd: int, pid: int, limits: tuple[int, int]) -> None:
        # Nobody can reuse the number: who has it is below us, and we reap.
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(pidfd, 0)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        os.close(pidfd)

    def shutdown_one(self) -> None:
        sockets = []
        for name in os.listdir(f"/proc/{self.pid}/fd"):
            with contextlib.suppress(OSError):
                to = os.readlink(f"/proc/{self.pid}/fd/{name}")
                if to.startswith("socket:") and to not in self.spared:
                    sockets.append(int(name))
        if not sockets:
            return
        pidfd = os.pidfd_open(self.pid)
        fd = libc.syscall(GETFD, pidfd, self.rng.choice(sockets), 0)
        os.close(pidfd)
        if fd < 0:
            return
        to = os.readlink(f"/proc/self/fd/{fd}")
        if not to.startswith("socket:") or to in self.spared:
            os.close(fd)  # the number is another's by now
            return
        with socket.socket(fileno=fd) as sock, contextlib.suppress(OSError):
            sock.shutdown(self.rng.choice([0, 1, 2]))

    def step(self) -> None:
        kind = self.rng.choices(
            ("kill", "term", "stop", "shutdown", "limit", "limit_below"),
            (10, 1, 6, 3, 2, 1),
        )[0]
        self.done[kind] += 1
        if kind == "shutdown":
            self.shutdown_one()
        elif kind == "limit":
            top = max(map(int, os.listdir(f"/proc/{self.pid}/fd")))
            pidfd = os.pidfd_open(self.pid)
            low = self.rng.choice([3, top + 1, top + 2, top + 5, top + 20])
            self.limit(os.dup(pidfd), self.pid, (low, self.limits[1]))
            spell = self.rng.choice([0.001, 0.01, 0.05])
            self.after(spell, self.limit, pidfd, self.pid, self.limits)
        elif (found := self.victim()) is not None:
            pid, pidfd = found
            if kind == "stop":
                self.send(signal.SIGSTOP, pidfd)
                self.after(self.rng.choice([0, 0.01, 0.2]), self.cont, pidfd)
            elif kind == "limit_below":
                low = self.rng.randrange(3, 12), self.limits[1]
                self.limit(os.dup(pidfd), pid, low)
                self.after(0.02, self.limit, pidfd, pid, self.limits)
            else:
                self.send(9 if kind == "kill" else 15, pidfd)
                os.close(pidfd)

    def undo(self, all: bool = False) -> None:
        now = time.monotonic()
        due = [x for x in self.late if all or x[0] <= now]
        self.late = [x for x in self.late if not (all or x[0] <= now)]
        for _, _, (what, *args) in due:
            what(*args)


def main(seed: int, seconds: str, *options: str) -> int:
    global app
    assert libc.prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER
    app = subprocess.Popen(
        [
            sys.executable,
            *("-X", "dev", "-W", "error", "-u"),
            Path(__file__).with_name("chaos_app.py"),
            *(str(seed), seconds, *options),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    spared = app.stdout.readline().split()
    party = Party(app.pid, seed, {x.decode() for x in spared})
    pace = party.rng.choice([50, 200, 1000])  # things done in a second
    while not select.select([app.stdout], [], [], party.rng.expovariate(pace))[0]:
        party.step()
        party.undo()
        reap()
    party.undo(all=True)
    print(dict(party.done), flush=True)
    app.stdin.close()
    until = time.monotonic() + 5 * HANG
    while app.poll() is None and time.monotonic() < until:
        select.select([app.stdout], [], [], 0.05)
        reap()
    if app.poll() is None:
        os.kill(app.pid, signal.SIGABRT)  # faulthandler says where it is
        print("the application does not end")
    sys.stdout.write(app.stdout.read().decode())
    status = app.wait()
    until = time.monotonic() + HANG
    while (left := reap()) and time.monotonic() < until:
        time.sleep(0.01)
    for pid in left:
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            print("FAULT outlived:", pid, line, Path(f"/proc/{pid}/wchan").read_text())
        os.kill(pid, signal.SIGKILL)
    return status or bool(left)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
