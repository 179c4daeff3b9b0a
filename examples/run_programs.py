"""A faster fork and exec: run programs, and capture what they print.

The application is not forked, however big it is: a process of a few megabytes
turns into the program, after it was prepared at leisure. Its standard output
goes to a file here, and its standard error to us.
"""

import asyncio
import tempfile

import afork

SCRIPT = 'echo "$GREETING from $PWD"; echo "nothing to complain about" >&2; exit 3'


async def main() -> None:
    with tempfile.TemporaryFile() as output:
        fork = afork.Fork.new().set(env={"GREETING": "hi"}, cwd="/", umask=0o077)
        sock = await fork.exec("sh", "-c", SCRIPT, stdout=output, stderr=afork.SOCKET)
        # Here the program runs. Had it not been found, exec had raised OSError.
        assert sock is not None
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        complaints = await reader.read()
        writer.close()
        await writer.wait_closed()
        print("exit status:", await fork.wait())
        output.seek(0)
        print("output:", output.read().decode().rstrip())
        print("errors:", complaints.decode().rstrip())

    try:
        await afork.Fork.new().exec("no-such-program")
    except FileNotFoundError as exc:
        print("not found:", exc.filename)


asyncio.run(main())
