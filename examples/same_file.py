"""Keep the code of a worker in the same file, as a string.

It is compiled in the new process, whose ``__main__`` is otherwise empty: this
file is not loaded there, so it needs no guard. Arguments of eval are for the
code that is evaluated; those of send_arg are for the function that is run.
"""

import asyncio

import afork

WORKER = """
import math

(title,) = args

def factorials(sock, *numbers):
    with sock:
        for n in map(int, numbers):
            sock.sendall(f"{title} {n}! = {math.factorial(n)}\\n".encode())
"""


async def main() -> None:
    fork = afork.Fork.new().eval(WORKER, "computed:").send_arg("5", "10", "20")
    sock = await fork.run("factorials")
    reader, writer = await asyncio.open_unix_connection(sock=sock)
    print((await reader.read()).decode(), end="")
    writer.close()
    await writer.wait_closed()

    # What goes wrong over there is raised here, with the line that did it.
    try:
        await afork.Fork.new().eval("answer = 6 * nine").ready()
    except afork.RemoteError as exc:
        print("error:", exc.type, exc.message)


asyncio.run(main())
