"""A program in one file whose workers are forks of it, prepared at its start.

No Python interpreter is executed, so none has to be found, and no other file
either: this suits programs that are shipped as one.
"""

import afork.early  # 1. first line: a template with nothing of this program in it

# isort: split
# 2. Load what the workers need.
import asyncio
import socket
import string

# 3. Define what they do.
ALPHABET = string.ascii_lowercase


def rotate(sock: socket.socket, text: str, by: str) -> None:
    n = int(by)
    table = str.maketrans(ALPHABET, ALPHABET[n:] + ALPHABET[:n])
    with sock:
        sock.sendall(text.translate(table).encode())


# 4. Keep the program as it is now. Whatever follows is not in the workers.
from afork.template import TEMPLATE  # noqa: E402


async def answer(fork: afork.Fork, text: str, by: int) -> str:
    sock = await fork.send_arg(text, str(by)).run(rotate)
    reader, writer = await asyncio.open_unix_connection(sock=sock)
    try:
        return (await reader.read()).decode()
    finally:
        writer.close()
        await writer.wait_closed()


async def main() -> None:
    assert TEMPLATE is not None
    forks = [TEMPLATE.fork() for _ in range(10)]
    words = await asyncio.gather(
        *(answer(fork, "afork", by) for by, fork in enumerate(forks))
    )
    print(" ".join(words))

    # Packages that make processes of their own get them from Early's template.
    fork = afork.Fork.new().eval("assert 'asyncio' not in __import__('sys').modules")
    await fork.ready()
    print("a new process is empty")
    fork.close()


asyncio.run(main())
