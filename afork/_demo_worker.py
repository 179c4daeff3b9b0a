"""The server of ``python -m afork demo``: loaded once, by its template.

An ordinary blocking server on a socket that it is given. It knows which
numbers are prime from a table of some megabytes, which all workers share.
"""

from __future__ import annotations

import os
import select
import socket
from http.server import BaseHTTPRequestHandler, HTTPServer

#: Numbers below this are looked up.
LIMIT = 8_000_000

#: One byte per number: whether it is prime.
table = bytearray()


def prepare() -> None:
    """Compute the table, before the first worker is forked."""
    table[:] = b"\0\0" + b"\1" * (LIMIT - 2)
    for n in range(2, int(LIMIT**0.5) + 1):
        if table[n]:
            table[n * n :: n] = bytes(len(range(n * n, LIMIT, n)))


class Handler(BaseHTTPRequestHandler):
    """GET /next-prime/N and GET /table."""

    served = 0

    def do_GET(self) -> None:
        _, what, *rest = self.path.split("/")
        if what == "table":
            body = memoryview(table)
        else:
            body = memoryview(b"%d" % table.index(1, int(rest[0])))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Pid", str(os.getpid()))
        self.end_headers()
        self.wfile.write(body)
        Handler.served += 1

    def log_message(self, format: str, *args: object) -> None:
        pass


def serve(control: socket.socket, listener: socket.socket) -> None:
    """What each worker runs: serve until the application closes its end.

    Args:
        control: The socket to the application, told the number of answers.
        listener: The socket that all workers accept connections on.
    """
    with HTTPServer(("", 0), Handler, bind_and_activate=False) as server:
        server.socket.close()
        server.socket = listener
        server.timeout = 0  # another worker may have been faster
        while control not in select.select([control, listener], [], [])[0]:
            server.handle_request()
    control.sendall(b"%d" % Handler.served)
