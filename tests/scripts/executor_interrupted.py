"""An application in the foreground whose user presses Ctrl-C."""

import time

import afork


def work():
    print("runs", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    with afork.Executor(1) as executor:
        futures = [executor.submit(work) for _ in range(3)]
        futures[0].result()
