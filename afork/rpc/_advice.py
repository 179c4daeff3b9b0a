"""What to do about values that cannot be sent: a note to the codec's own error."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial

from ._codecs import Codec

_OR_ELSE = 'or give codec="cloudpickle" (pip install afork[cloudpickle])'
_LOCAL = (
    "a process finds a function or class by its module and name; lambdas, and what "
    "is defined inside a function, exist only here. Define it at the top of a "
    f"module, {_OR_ELSE}"
)
_NO_MAIN = (
    "__main__ is not the program here but %r, which runs it: what python -m "
    "cProfile, -m trace and the like may do. Put what processes need into a module "
    f"that the program imports, {_OR_ELSE}"
)
_OTHER = (
    "what is sent to a process is pickled. Generators, open files, locks and "
    "connections exist only here: send what they are made from, such as a list or "
    "a path"
)


def advise(error: Exception, codec: Codec, values: Iterable[object]) -> None:
    """Add a note to an error that the codec has raised for one of the values."""
    if codec.pickles:
        by_name = codec.name != "cloudpickle"
        texts = [text for value in values if by_name and (text := _advice(value))]
        error.add_note(f"afork: {texts[0] if texts else _OTHER}")


def _advice(value: object) -> str:
    """For a function, class or object that no process can find by its name."""
    while isinstance(value, partial):
        value = value.func
    if hasattr(value, "gi_frame"):
        return ""  # a generator has the name of its function
    named = value if hasattr(value, "__qualname__") else type(value)
    name = str(getattr(named, "__qualname__", ""))
    if "<" in name:  # <lambda>, <locals>
        return _LOCAL
    main = sys.modules["__main__"]
    in_main = getattr(named, "__module__", None) == "__main__"
    if in_main and not hasattr(main, name.partition(".")[0]):
        return _NO_MAIN % main
    return ""
