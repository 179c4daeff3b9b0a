"""The name under which a process finds the function that it is to enter."""

from __future__ import annotations

import sys
from collections.abc import Callable

from . import _child


def function_name(
    func: str | Callable[..., object], has_main: bool
) -> tuple[str, bool]:
    """The name to send, and whether the process must load our main program.

    Args:
        func: A name, or a callable that can be imported under its own.
        has_main: Whether the process was forked from the main program.

    Raises:
        TypeError: nothing that can be imported: a lambda, a closure, a method.
        ValueError: an empty name.
        RuntimeError: the main program lacks its guard.
    """
    if isinstance(func, str):
        if not func or "\0" in func:
            raise ValueError(f"not the name of a function: {func!r}")
        return func, False
    if not callable(func):
        raise TypeError(f"a function or its name is needed, not {type(func).__name__}")
    module = getattr(func, "__module__", None)
    name = getattr(func, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError(
            f"{func!r} has no name to import it by: run a function of a module"
        )
    if "<" in name:  # <lambda>, <locals>
        raise TypeError(
            f"{module}.{name} cannot be imported in the process: lambdas and "
            "functions inside functions exist only here"
        )
    found: object = sys.modules.get(module)
    for attribute in name.split("."):
        found = getattr(found, attribute, None)
    # A class method is a new object at each access, and equal to itself; a
    # decorator may have left the function itself inside.
    if found is None:
        why = f"it is not in the module {module!r} of this one either"
        if module == "__main__":
            why += (
                f", which is {sys.modules[module]!r}. What runs the program (python "
                "-m cProfile, -m trace) may have kept that name: put the function "
                "into a module that the program imports"
            )
        raise TypeError(f"{module}.{name} cannot be imported in the process: {why}")
    if found != func and getattr(found, "__wrapped__", None) is not func:
        raise TypeError(
            f"{module}.{name} is not {func!r}: the process would run something else"
        )
    # A process that has loaded the main program knows it by the second name.
    of_main = module in ("__main__", "__mp_main__")
    if of_main and _child.loading_main:
        raise RuntimeError(
            f"{name} is run by code that executes whenever the main program is "
            "loaded, as it is to find that function: put it under if __name__ == "
            '"__main__":'
        )
    return f"{module}:{name}", of_main and not has_main
