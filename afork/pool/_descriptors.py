"""How many processes the limit of open files leaves room for."""

from __future__ import annotations

import os
import resource

#: So many descriptors, or this part of the limit if it is more, are left to the
#: application: a pool that took the last would break what has nothing to do
#: with it.
_RESERVE, _PART = 16, 8


def count_affordable(each: int, owed: int) -> int:
    """How many processes can be started without taking the last descriptors.

    To find out by starting them is too late: those on their way, whose sockets
    are still to come, would be lost as well.

    Args:
        each: Descriptors that one takes while it starts.
        owed: Descriptors that those on their way will take yet.
    """
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return 1 << 30
    spare = soft - max(_RESERVE, soft // _PART) - _count_open() - owed
    return max(0, spare // each)


def _count_open() -> int:
    """Descriptors that this process has open."""
    # Linux 6.2 has the number as the size; before, the names must be counted.
    try:
        return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0  # no descriptor to list them: starting one will say so
