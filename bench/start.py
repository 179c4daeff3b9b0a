#!/usr/bin/env python3
"""The first part of the benchmark: how fast workers and programs start.

Ours beside its peers and beside limit programs in C, in alternating rounds. Printed
are medians over the rounds. See ``--help``.
"""

import sys

import part
import table
import targets
from contenders import contenders

if __name__ == "__main__":
    sys.exit(
        part.main(
            "start",
            __doc__,
            contenders(),
            table.summary,
            table.render,
            targets.targets,
            seconds=0.4,
        )
    )
