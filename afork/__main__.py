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
    parser.parse_args()

    from . import _demo

    return _demo.main()


if __name__ == "__main__":
    sys.exit(main())
