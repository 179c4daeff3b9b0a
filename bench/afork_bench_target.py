"""What the benchmark's workers run.

Nothing. A module of its own, so that importing it is cheap and can be preloaded.
"""


def leave(sock: object = None) -> None:
    """Return at once: the worker ends, and the application reads EOF."""
