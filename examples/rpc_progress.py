"""Call a function in a process of its own, and hear how far it has come.

Each call is awaited as if the function were here. Events travel ahead of the
answer, with the number of the call that has sent them.
"""

import asyncio

import afork
import afork.rpc


def factorize(number: int) -> list[int]:
    """In the process: the prime factors, an event for each as it is found."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
            afork.rpc.event("factor", divisor, number)
        divisor += 1
    return factors


def show(event: afork.Event) -> None:
    what, factor, left = event.args
    print(f"   {what} {factor}, {left} left")


async def main() -> None:
    async with afork.Fork.new().rpc(factorize, on_event=show) as rpc:
        for number in (360, 1001):
            print(number)
            print(f"   {await rpc(number)}")
        try:
            await rpc("many")
        except TypeError as exc:  # as it was raised there
            print("TypeError:", exc)


# The process loads this file to find the function, hence the guard.
if __name__ == "__main__":
    asyncio.run(main())
