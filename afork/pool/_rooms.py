"""Processes of a pool by the number of calls that each has."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._worker import Worker


class Rooms:
    """Those that may get calls, and which of them has the least.

    Args:
        load: So many calls may one process have.
    """

    def __init__(self, load: int) -> None:
        self._full = load
        self._by_calls: list[dict[Worker, None]] = [{} for _ in range(load + 1)]
        #: None of them has less: to look through all would be most of a call's
        #: cost with a load of 64.
        self._least = 0
        #: Those without a call, the one used least first.
        self.idle = self._by_calls[0]

    def add(self, worker: Worker) -> None:
        """A process without calls."""
        self.idle[worker] = None
        self._least = 0

    def remove(self, worker: Worker) -> None:
        """It gets no further calls."""
        for room in self._by_calls:
            room.pop(worker, None)

    def least(self) -> Worker | None:
        """The process with the least calls, if it may have one more."""
        rooms, least, full = self._by_calls, self._least, self._full
        while least < full and not rooms[least]:
            least += 1
        self._least = least
        # The one used last: its memory is in the caches, and others become idle
        # for long enough to be stopped.
        return next(reversed(rooms[least])) if least < full else None

    def taken(self, worker: Worker, calls: int, last: bool) -> None:
        """It gets one call more than so many; perhaps its last."""
        del self._by_calls[calls][worker]
        if not last:
            self._by_calls[calls + 1][worker] = None

    def freed(self, worker: Worker, calls: int) -> None:
        """It has one call less, so many now."""
        room = self._by_calls[calls + 1]
        if worker in room:  # else it has had its last
            del room[worker]
            self._by_calls[calls][worker] = None
            self._least = min(self._least, calls)
