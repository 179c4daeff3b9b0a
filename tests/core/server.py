"""A stub server (stub_server.c) to be driven over its socket."""

import os
import select
import socket
import struct
import subprocess

from .reference import Peer

FORK = 1  # enum afork_stage
SETUP, CWD, EXEC = 2, 3, 4


class Server(Peer):
    """A stub server and our end of its socket."""

    def __init__(self, program: str, flags: str = "") -> None:
        ours, theirs = socket.socketpair()
        super().__init__(ours)
        self.log_fd, log = os.pipe()
        command = [program, str(theirs.fileno()), str(log), flags]
        with theirs:
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno(), log],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PATH": "/bin:/usr/bin"},
            )
        os.close(log)
        self.pid = self.process.pid

    def __exit__(self, *exc) -> None:
        """However the test ended, nothing is left of the server."""
        self.sock.close()
        try:
            self.log()
        finally:
            os.close(self.log_fd)
            self.process.kill()
            self.process.wait()

    def log(self) -> list[str]:
        """Wait until every process has gone; what they called, without pids."""
        text = b""
        while True:
            ready, _, _ = select.select([self.log_fd], [], [], 20)
            assert ready, "somebody is still there"
            more = os.read(self.log_fd, 65536)
            if not more:
                return [line.split(" ", 1)[-1] for line in text.decode().splitlines()]
            text += more

    def end(self) -> tuple:
        """Half-close; return the exit status, the reports, and the log."""
        self.sock.shutdown(socket.SHUT_WR)
        reports = self.reports()
        return self.process.wait(20), reports, self.log()


def names(reports) -> list[str]:
    return [report[0] for report in reports]


def done_token(peer: Peer, token: int = 1) -> None:
    """Wait until everything before this has been executed."""
    peer.send("READY", struct.pack("=Q", token))
    assert peer.report() == ("DONE", token)


def spawn(peer, number, payload, *handles):
    for fd in handles:
        peer.handle(fd)
    peer.send("SPAWN", struct.pack("=Q", number) + payload)


def mask(lines, name: str) -> set[int]:
    (line,) = [x for x in lines if x.startswith(name)]
    bits = int(line.split()[1], 16)
    # 32 and 33 are glibc's; some starters leave them ignored, and sigaction
    # refuses to change that.
    return {n for n in range(1, 65) if bits & 1 << n - 1} - {32, 33}
