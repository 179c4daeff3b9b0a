"""Options of one call, applied in the process around its function."""

from __future__ import annotations

TYPE_CHECKING = False  # see afork/__init__.py
if TYPE_CHECKING:
    from contextvars import ContextVar, Token
    from typing import Any

    from ._serve import Server


def set_context(
    server: Server, packed: bytes, tokens: list[tuple[ContextVar[Any], Token[Any]]]
) -> None:
    """Give context variables the values that they have in the application.

    Args:
        server: This process's.
        packed: The values by name, encoded.
        tokens: Gets what resets each variable that was set.
    """
    values: dict[str, object] = server.codec.decode(packed, ())
    for name, value in values.items():
        variable: ContextVar[Any] = find_variable(name)
        tokens.append((variable, variable.set(value)))


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


class Applied:
    """The options of one call, for as long as it runs.

    What it has written is sent at the end, whatever has happened.
    """

    def __init__(self, server: Server, id: int, options: dict[str, bytes]) -> None:
        self.server = server
        self.id = id
        self.options = options
        self.tokens: list[tuple[ContextVar[Any], Token[Any]]] = []
        self.capture: Any = None
        self.alarm: Alarm | None = None

    def __enter__(self) -> None:
        try:
            if "context" in self.options:
                set_context(self.server, self.options["context"], self.tokens)
            if "capture" in self.options:
                from ._redirect import Capture

                capture = Capture()
                capture.__enter__()
                self.capture = capture
                if self.server.store is not None:
                    self.server.store.put(self.id, capture.files)
            if "timeout" in self.options:
                alarm = Alarm(float(self.options["timeout"]))
                alarm.__enter__()
                self.alarm = alarm
        except BaseException:
            self._leave()
            raise

    def __exit__(self, *exc_info: object) -> None:
        self._leave()

    def _leave(self) -> None:
        try:
            if self.alarm is not None:
                self.alarm.__exit__(None, None, None)
        finally:
            for variable, token in reversed(self.tokens):
                variable.reset(token)
            if self.capture is not None:
                self.capture.__exit__(None, None, None)
                self.server.send_output(self.id, self.capture)
