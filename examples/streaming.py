"""Read the items of a generator that runs in another process.

The generator is never more than a few items ahead of the reader, however slow
that is: it waits. Leaving the block ends it.
"""

import asyncio
from collections.abc import Iterator

import afork


def collatz(number: int) -> Iterator[int]:
    """In the process: halve, or triple and add one, for ever."""
    while True:
        yield number
        number = number // 2 if number % 2 == 0 else 3 * number + 1


async def main() -> None:
    async with afork.Fork.new().rpc(collatz) as rpc:
        async with rpc.stream(27) as numbers:
            highest = steps = 0
            async for number in numbers:
                highest = max(highest, number)
                if number == 1:
                    break
                steps += 1
        print(f"27 comes down to 1 in {steps} steps, from {highest}")


# The process loads this file to find the function, hence the guard.
if __name__ == "__main__":
    asyncio.run(main())
