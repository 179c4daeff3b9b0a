"""A part of CPython's own tests, run in workers of a frozen template.

Prints what fails there but not in a worker of a template that is not frozen, as
JSON: {"tests": number, "worse": {module: [test, ...]}}. Arguments: which part of
the modules, and of how many.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import afork

#: Containers, the collector, classes, code, and what is built from them.
MODULES = [
    "abc",
    "array",
    "asyncgen",
    "bytes",
    "call",
    "class",
    "code",
    "collections",
    "contextlib",
    "copy",
    "coroutines",
    "dataclasses",
    "deque",
    "descr",
    "dict",
    "enum",
    "exceptions",
    "float",
    "format",
    "fractions",
    "frame",
    "fstring",
    "funcattrs",
    "functools",
    "gc",
    "generators",
    "heapq",
    "inspect",
    "iter",
    "itertools",
    "json",
    "list",
    "memoryview",
    "metaclass",
    "module",
    "monitoring",
    "ordered_dict",
    "pickle",
    "property",
    "range",
    "re",
    "scope",
    "set",
    "slice",
    "sort",
    "string",
    "struct",
    "super",
    "tuple",
    "types",
    "typing",
    "userdict",
    "weakref",
    "weakset",
    "asyncio.test_futures",
]

SECONDS = 60  # a module that takes longer hangs

CODE = """
import io, json, os, sys, unittest

def go(sock, name):
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    suite = unittest.defaultTestLoader.loadTestsFromModule(sys.modules[name])
    result = unittest.TextTestRunner(stream=io.StringIO(), verbosity=0).run(suite)
    bad = [str(test) for test, _ in result.failures + result.errors]
    sock.sendall(json.dumps([result.testsRun, sorted(bad)]).encode())
"""


def full_name(module: str) -> str:
    package, dot, name = module.partition(".")
    return f"test.test_{package}.{name}" if dot else f"test.test_{module}"


async def run(template: afork.Fork, name: str) -> tuple[int, list[str]]:
    """The tests of one module in one worker: how many, and which have failed."""
    loop = asyncio.get_running_loop()
    f = template.fork().send_arg(name)
    data = b""
    with await f.run("go") as sock:
        async with asyncio.timeout(SECONDS):
            while chunk := await loop.sock_recv(sock, 65536):
                data += chunk
    if not data:
        return 0, [f"ended with {await f.wait()}"]
    n, bad = json.loads(data)
    return n, bad


async def main() -> None:
    part, parts = map(int, sys.argv[1:])
    names = [full_name(module) for module in MODULES[part::parts]]
    places = asyncio.Semaphore(2)

    async def one(template: afork.Fork, name: str) -> tuple[int, list[str]]:
        async with places:
            return await run(template, name)

    def make() -> afork.Fork:
        return afork.Fork.new_exec().eval(CODE).require("test.support", *names)

    template = make().freeze()
    results = await asyncio.gather(*(one(template, name) for name in names))
    template.close()
    template = make()
    worse: dict[str, Any] = {}
    for name, (_, bad) in zip(names, results, strict=True):
        if bad and (more := set(bad) - set((await one(template, name))[1])):
            # Some depend on time: they get a second chance.
            again = make().freeze()
            more &= set((await one(again, name))[1])
            again.close()
            if more:
                worse[name] = sorted(more)
    template.close()
    print(json.dumps({"tests": sum(n for n, _ in results), "worse": worse}))


if __name__ == "__main__":
    asyncio.run(main())
