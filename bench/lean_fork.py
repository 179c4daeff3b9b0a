"""os.fork from a lean interpreter.

The seed's benchmark, run as ``python -I -S lean_fork.py INFLIGHT SECONDS COUNT``; with
a fourth number, the pause between two starts, it tells the time to each first byte.

Only C modules and ``os`` are imported, and no at-fork callback is registered: this is
the least that Python's own fork costs, not what an application with asyncio and
threading in it would see.
"""

import _signal  # type: ignore[import-not-found]
import _socket
import os
import select
import sys
import time


def start() -> _socket.socket:
    ours, theirs = _socket.socketpair()
    if os.fork() == 0:
        os._exit(0)
    theirs.close()
    return ours


def latencies(seconds: float, count: int, gap: float) -> None:
    """One at a time with a pause between: microseconds to the child's first byte."""
    us = []
    begin = time.perf_counter()
    while len(us) < count if count else time.perf_counter() < begin + seconds:
        time.sleep(gap)
        asked = time.perf_counter()
        ours, theirs = _socket.socketpair()
        if (pid := os.fork()) == 0:
            theirs.send(b"x")
            os._exit(0)
        theirs.close()
        if ours.recv(1) != b"x":
            raise SystemExit("lean_fork: the child ended without its byte")
        us.append((time.perf_counter() - asked) * 1e6)
        ours.close()
        os.waitpid(pid, 0)
    elapsed = time.perf_counter() - begin
    print(f'{{"n": {len(us)}, "seconds": {elapsed:.6f}, "us": {us}}}')


def main() -> None:
    inflight, seconds, count = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    _signal.signal(_signal.SIGCHLD, _signal.SIG_IGN)
    poll = select.poll()
    waiting: dict[int, _socket.socket] = {}
    n = 0
    cpu = time.process_time()
    begin = time.perf_counter()
    until = begin + seconds
    while True:
        while len(waiting) < inflight and (
            n < count if count else time.perf_counter() < until
        ):
            sock = start()
            waiting[sock.fileno()] = sock
            if inflight > 1:
                poll.register(sock.fileno(), select.POLLIN)
            n += 1
        if not waiting:
            break
        for fd in [fd for fd, _ in poll.poll()] if inflight > 1 else list(waiting):
            sock = waiting.pop(fd)
            if sock.recv(1) != b"":
                raise SystemExit("lean_fork: the child sent something")
            if inflight > 1:
                poll.unregister(fd)
            sock.close()
    elapsed = time.perf_counter() - begin
    cpu = time.process_time() - cpu
    print(
        f'{{"n": {n}, "seconds": {elapsed:.6f}, "cpu_us": {cpu * 1e6 / max(n, 1):.3f}}}'
    )


if len(sys.argv) > 4:
    latencies(float(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
else:
    main()
