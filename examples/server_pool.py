"""A pool of servers that all accept connections on one socket.

One process is prepared: it imports what the servers need and holds the
listening socket. Each server is a fork of it and has both from the start.
"""

import asyncio
import os
import socket

import afork

SERVERS = 4
CONNECTIONS = 100


def serve(control: socket.socket, listener: socket.socket, number: str) -> None:
    """In each server: answer connections, one after the other."""
    control.close()  # not needed: the application ends us by a signal
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"%s %d" % (number.encode(), os.getpid()))


async def ask(port: int) -> tuple[str, int]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    number, pid = (await reader.read()).decode().split()
    writer.close()
    await writer.wait_closed()
    return number, int(pid)


async def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=CONNECTIONS)
    port = listener.getsockname()[1]

    # This file, imported by its name: once, and not by every server.
    pool = afork.Fork.new().require("server_pool").send_fh(listener)
    listener.close()  # they have their own copies

    servers = [pool.fork().send_arg(str(n)) for n in range(SERVERS)]
    for server in servers:
        server.run("server_pool.serve")  # configure and forget

    answers = await asyncio.gather(*(ask(port) for _ in range(CONNECTIONS)))
    print(len(answers), "connections served")
    strangers = set(answers) - {(str(n), s.pid) for n, s in enumerate(servers)}
    print("by our servers only:", not strangers)

    for server in servers:
        server.terminate()
    print("exit statuses:", [await server.wait() for server in servers])


if __name__ == "__main__":
    asyncio.run(main())
