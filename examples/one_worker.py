"""Start one process, run a function in it, and talk to it.

Awaiting run gives our end of a socket whose other end is the function's first
argument. What goes over it is up to you: lines, here.
"""

import asyncio
import socket

import afork


def greeter(sock: socket.socket, greeting: str) -> None:
    """In the new process: answer each name with a greeting, until the end."""
    with sock, sock.makefile("rw", encoding="utf-8") as stream:
        for name in stream:
            stream.write(f"{greeting}, {name}")
            stream.flush()


async def main() -> None:
    fork = afork.Fork.new().send_arg("hello")
    reader, writer = await asyncio.open_unix_connection(sock=await fork.run(greeter))
    for name in ("anna", "otto"):
        writer.write(f"{name}\n".encode())
        print((await reader.readline()).decode().rstrip())
    writer.close()  # the function reads end of file, and returns
    await writer.wait_closed()
    print("exit status:", await fork.wait())


# The process loads this file to find the function, hence the guard.
if __name__ == "__main__":
    asyncio.run(main())
