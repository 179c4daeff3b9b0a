"""Options of one call, applied in the process around its function."""

from __future__ import annotations

TYPE_CHECKING = False  # see afork/__init__.py
if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import ContextVar, Token
    from typing import Any

    from ._serve import Server


def set_context(
    server: Server, packed: bytes
) -> list[tuple[ContextVar[Any], Token[Any]]]:
    """Give context variables the values that they have in the application."""
    values: dict[str, object] = server.codec.decode(packed, ())
    tokens = []
    for name, value in values.items():
        variable: ContextVar[Any] = find_variable(name)
        tokens.append((variable, variable.set(value)))
    return tokens


def find_variable(name: str) -> ContextVar[Any]:
    """The context variable behind "pkg.mod:name".

    Raises:
        TypeError: it is something else.
    """
    module, _, path = name.partition(":")
    found: Any = __import__(module, fromlist=["*"])
    for attribute in path.split("."):
        found = getattr(found, attribute)
    from contextvars import ContextVar

    if not isinstance(found, ContextVar):
        raise TypeError(f"{name} is not a context variable: {found!r}")
    return found


class Alarm:
    """Raises TimeoutError in the function once its time is up.

    By the interval timer and SIGALRM: what else interrupts a function in the
    main thread is either not an exception or not on time.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        import _signal  # type: ignore[import-not-found]  # light, unlike signal

        self.signal = _signal
        self.armed = True
        self.before = _signal.signal(_signal.SIGALRM, self._ring)
        _signal.setitimer(_signal.ITIMER_REAL, self.seconds)

    def _ring(self, number: int, frame: object) -> None:
        if self.armed:
            self.armed = False
            raise TimeoutError(f"the call has run for {self.seconds:g} s")

    def __exit__(self, *exc_info: object) -> None:
        # First: from here on a late signal must not raise.
        self.armed = False
        self.signal.setitimer(self.signal.ITIMER_REAL, 0)
        self.signal.signal(self.signal.SIGALRM, self.before)


def call_with(
    server: Server,
    id: int,
    options: dict[str, bytes],
    func: Callable[..., object],
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> object:
    """Call a function under options; its output is sent, whatever happens."""
    tokens = []
    capture: Any = None
    if "context" in options:
        tokens = set_context(server, options["context"])
    try:
        if "capture" in options:
            from ._redirect import Capture

            capture = Capture()
            capture.__enter__()
        try:
            if "timeout" in options:
                with Alarm(float(options["timeout"])):
                    return func(*args, **kwargs)
            return func(*args, **kwargs)
        finally:
            if capture is not None:
                capture.__exit__(None, None, None)
                server.send_output(id, capture.stdout, capture.stderr)
    finally:
        for variable, token in reversed(tokens):
            variable.reset(token)
