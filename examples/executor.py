"""An executor for code that knows `concurrent.futures`, not afork.

Threads of one process share one interpreter lock; the calls of this executor
have a process each. Cancelling the future ends the call that runs.
"""

import asyncio
import hashlib
import time
from concurrent.futures import as_completed

import afork


def stretch(password: str) -> str:
    """In a process: as slow as it is meant to be."""
    return hashlib.pbkdf2_hmac("sha256", password.encode(), b"salt", 100_000).hex()[:12]


async def main(executor: afork.Executor) -> None:
    loop = asyncio.get_running_loop()
    words = ("anna", "otto", "hannah")
    futures = [loop.run_in_executor(executor, stretch, word) for word in words]
    for word, digest in zip(words, await asyncio.gather(*futures), strict=True):
        print(f"{word:8}{digest}")

    future = loop.run_in_executor(executor, time.sleep, 60)
    await asyncio.sleep(0.1)
    print("cancelled while it ran:", future.cancel())


# The processes load this file to find the function, hence the guard.
if __name__ == "__main__":
    with afork.Executor(max_workers=2) as executor:
        asyncio.run(main(executor))
        # Without asyncio it is the same.
        calls = [executor.submit(divmod, n, 7) for n in range(20, 23)]
        print("divmod:", sorted(call.result() for call in as_completed(calls)))
