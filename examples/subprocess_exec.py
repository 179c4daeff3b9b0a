"""Run programs as with asyncio, without ever stopping the event loop.

Arguments and results are those of asyncio's functions of the same names; a
template process starts the programs.
"""

import asyncio
from asyncio.subprocess import PIPE, STDOUT

import afork


async def main() -> None:
    sort = await afork.create_subprocess_exec("sort", "-n", stdin=PIPE, stdout=PIPE)
    out, _ = await sort.communicate(b"10\n9\n100\n")
    print("sorted:", out.decode().split())

    shell = await afork.create_subprocess_shell(
        "echo one; echo two >&2; exit 4", stdout=PIPE, stderr=STDOUT
    )
    assert shell.stdout is not None
    async for line in shell.stdout:
        print("line:", line.decode().rstrip())
    print("exit status:", await shell.wait())

    sleeper = await afork.create_subprocess_exec("sleep", "1000")
    sleeper.terminate()
    print("terminated:", await sleeper.wait())

    programs = await asyncio.gather(
        *(afork.create_subprocess_exec("true") for _ in range(20))
    )
    print("at once:", sum([await p.wait() for p in programs]), "of 20 failed")


asyncio.run(main())
