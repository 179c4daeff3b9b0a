"""The console script afork-serve: a server for foreign clients.

``AnyEvent::Fork`` executes its interpreter with options of Perl and, last, the
number of a socket and its own pid. Everything but these two is ignored, so the
script can be used as ``$AnyEvent::Fork::PERL``.
"""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Serve AnyEvent::Fork's protocol on the socket named in the arguments."""
    try:
        fd, owner = int(sys.argv[-2]), int(sys.argv[-1])
    except (ValueError, IndexError):
        sys.exit(
            "usage: afork-serve [ignored ...] FD OWNER\n"
            "Started by AnyEvent::Fork (set $AnyEvent::Fork::PERL to its path) "
            "or by afork.Fork.new_exec(command=[...]), not by hand."
        )
    import os

    from . import _afork, _child

    os.set_inheritable(fd, False)
    sys.argv[1:] = []
    names = sys.modules["__main__"].__dict__
    for name in [n for n in names if not n.startswith("__")]:
        del names[name]
    _afork.set_title(b"afork: exec of %d" % owner)
    _child.serve(fd, True)
