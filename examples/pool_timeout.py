"""A pool of processes: calls that take too long, are cancelled, or crash.

Whatever becomes of one call, the others do not notice, and the pool goes on.
"""

import asyncio
import ctypes
import math
import signal
import time

import afork


async def main() -> None:
    async with afork.Pool(max=2) as pool:
        print(
            "results:",
            await asyncio.gather(*(pool.call(math.isqrt, n) for n in (16, 81))),
        )

        try:
            await pool.with_options(timeout=0.2).call(time.sleep, 60)
        except TimeoutError as exc:
            print("timeout:", exc)

        # Dropped from outside: the process that sleeps is killed at once.
        task = asyncio.create_task(sleep_in(pool))
        await asyncio.sleep(0.1)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            print("cancelled")

        try:
            await pool.call(ctypes.string_at, 0)  # reads address 0
        except afork.WorkerLost as exc:
            print("crashed:", signal.Signals(exc.signal or 0).name)

        roots = [x async for x in pool.map(math.sqrt, range(0, 50, 7))]
        print("and on it goes:", [round(x, 1) for x in roots])
        counts = pool.stats().counts
        print(f"{counts.done} done, {counts.cancelled} cancelled, {counts.lost} lost")


async def sleep_in(pool: afork.Pool) -> None:
    await pool.call(time.sleep, 60)


asyncio.run(main())
