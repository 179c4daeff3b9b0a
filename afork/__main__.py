"""``python -m afork``: what the package does, to be watched."""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    """Run the subcommand of the command line; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m afork",
        description="Processes for asyncio applications, forked by a template.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "demo",
        help="serve HTTP requests from a pool of processes, kill one, count",
        description="Serves 2,000 HTTP requests from 4 processes that were forked "
        "from one template, kills one of them meanwhile and replaces it, runs a "
        "program, and prints what each process did and cost. The exit status is 0 "
        "if everything went as promised.",
    )
    commands.add_parser(
        "ps",
        help="list the processes of afork on this machine",
        description="Lists templates, workers, spares and the programs that they "
        "have started, as far as procfs may be read: age, PSS, private bytes, huge "
        "pages, threads, title.",
    )
    commands.add_parser(
        "tree",
        help="the same, each below its parent, with the applications",
        description="Shows the processes of afork below the applications that they "
        "belong to.",
    )
    command = parser.parse_args().command
    if command != "demo":
        from . import _ps

        return _ps.ps() if command == "ps" else _ps.tree()

    from . import _demo

    return _demo.main()


if __name__ == "__main__":
    sys.exit(main())
