"""What both back ends share: configuration, answers and events.

Part of every worker, so it loads little: neither asyncio nor threading.
"""

from __future__ import annotations

import os

import afork.rpc
from afork import _afork, _child

from ._codecs import Codec, close_all, find_codec
from ._exceptions import encode_exception, note_search_path
from ._kinds import ERROR, EVENT, KEYWORDS, OUTPUT, READY, RETIRE

TYPE_CHECKING = False  # see afork/__init__.py
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Any, TypeAlias

    from ._fdstore import Keeper
    from ._redirect import Capture

    #: kind, id, payload, descriptors
    Frame: TypeAlias = tuple[int, int, bytes, tuple[int, ...]]

#: A note on an error of a function or class of a program without a file.
_NO_MAIN = (
    "afork: the main program cannot be loaded in the process: it was typed in, read "
    "from standard input or given with -c. With codec='cloudpickle' its functions and "
    "classes are sent by value."
)


def apply(func: Callable[..., object], /, *args: object, **kwargs: object) -> object:
    """The function of a process that calls whatever it is sent."""
    return func(*args, **kwargs)


class Config:
    """How a process was asked to serve; the last argument of its function."""

    def __init__(self, packed: bytes) -> None:
        strings = _afork.unpack_strings(packed)
        names = [x.decode() for x in strings[::2]]
        self.values = dict(zip(names, strings[1::2], strict=True))

    def text(self, name: str) -> str:
        return self.values.get(name, b"").decode("utf-8", "surrogatepass")

    def number(self, name: str) -> int:
        return int(self.values.get(name, b"0"))


class Server:
    """A process that serves calls."""

    def __init__(self, sock: socket.socket, *args: Any) -> None:
        self.link = _afork.Link(sock.detach())
        self.config = Config(args[-1])
        #: Arguments and handles sent before: init's.
        self.args = args[:-1]
        self.codec: Codec = find_codec("pickle")
        self.func: Callable[..., object] = apply
        self.pid = os.getpid()
        #: Options of calls that have not arrived yet, by id.
        self.options: dict[int, dict[str, bytes]] = {}
        #: Keeps the files of a captured call, should this process die in it.
        self.store: Keeper | None = None

    def _redirect(self, config: Config) -> None:
        """Put the handles at the end of the arguments where they belong."""
        streams = [n for n in ("stdout", "stderr", "logs") if config.number(n)]
        handles = self.args[len(self.args) - len(streams) :]
        self.args = self.args[: len(self.args) - len(streams)]
        for name, handle in zip(streams, handles, strict=True):
            if name == "logs":
                from ._logs import install

                strings = _afork.unpack_strings(config.values["levels"])
                names = [x.decode() for x in strings[::2]]
                levels = dict(zip(names, map(int, strings[1::2]), strict=True))
                install(handle.detach(), config.number("level"), levels)
            else:
                from ._redirect import redirect

                with handle:
                    redirect(handle.fileno(), 1 if name == "stdout" else 2)

    def find(self) -> None:
        """Do what the configuration says, and find what it names.

        Raises:
            Exception: what importing it has raised.
        """
        self._redirect(self.config)
        self.codec = find_codec(self.config.text("codec"))
        self.func = self.resolve(self.config.text("func"))

    def init(self) -> Any:
        """Call what is to be called first; its result may have to be awaited."""
        args, self.args = self.args, ()
        name = self.config.text("init")
        if not name:
            return None
        if "initargs" in self.config.values:
            args += self.codec.decode(self.config.values["initargs"], ())
        return self.resolve(name)(*args)

    def resolve(self, name: str) -> Callable[..., Any]:
        if not name:
            return apply
        if name.startswith(("__main__:", "__mp_main__:")):
            self.load_main()
        try:
            found: Callable[..., Any] = _child._resolve(name)
        except (ImportError, AttributeError) as exc:
            note_search_path(exc)
            raise
        return found

    def load_main(self) -> None:
        """Load the application's main program, once."""
        main = self.config.values.get("main")
        if main is not None:
            _child.load_main(main)

    # -- calls

    def decode(
        self, kind: int, payload: bytes, fds: tuple[int, ...]
    ) -> tuple[Any, Any]:
        """Arguments and keyword arguments of a call."""
        # For a second attempt; decoding consumes them.
        again = [os.dup(fd) for fd in fds] if fds and self.may_load_main() else fds
        try:
            value: Any = self.codec.decode(payload, fds)
        except (AttributeError, ImportError) as exc:
            # Perhaps something of the main program, the first that is needed.
            if not self.may_load_main() or "__m" not in str(exc):
                if "__main__" in str(exc) and not self.knows_main():
                    exc.add_note(_NO_MAIN)
                else:
                    note_search_path(exc)
                raise
            self.load_main()
            value, again = self.codec.decode(payload, tuple(again)), ()
        finally:
            if again is not fds:
                close_all(again)
        return value if kind & KEYWORDS else (value, {})

    def may_load_main(self) -> bool:
        """Whether the main program is not loaded here, but could be."""
        known = self.codec.pickles and "main" in self.config.values
        return known and not _child.main_loaded

    def knows_main(self) -> bool:
        """Whether the main program could be loaded, or has been forked."""
        return "main" in self.config.values or hasattr(_child._main(), "__file__")

    def take_options(self, id: int, payload: bytes) -> None:
        strings = _afork.unpack_strings(payload)
        names = [x.decode() for x in strings[::2]]
        self.options[id] = dict(zip(names, strings[1::2], strict=True))

    def end_if_forked(self, exc: BaseException | None) -> None:
        """End a process that the function has forked off, and that came back.

        It has the same socket; but it is not the one that answers calls.
        """
        if os.getpid() != self.pid:
            _child.end(0 if exc is None else _child.exit_status(exc))

    # -- answers

    def send(self, kind: int, id: int, value: object) -> None:
        """Queue a value; the codec's exception if it cannot be encoded."""
        payload, fds = self.codec.encode(value)
        try:
            self.link.send(kind, id, payload, fds)
        finally:
            close_all(fds)

    def send_error(self, id: int, exc: BaseException, stage: str = "run") -> None:
        payload, fds = encode_exception(exc, self.codec, stage)
        try:
            self.link.send(ERROR, id, payload, fds)
        finally:
            close_all(fds)

    def send_output(self, id: int, capture: Capture) -> None:
        cut = [b"truncated"] if capture.truncated else []
        strings = (capture.stdout, capture.stderr, *cut)
        payload, fds = find_codec("bytes").encode(strings)
        try:
            self.link.send(OUTPUT, id, payload, fds)
        finally:
            close_all(fds)

    def send_ready(self) -> None:
        self.link.send(READY, 0, b"")

    # -- what afork.rpc offers

    def call_id(self) -> int:
        raise NotImplementedError

    def flush(self) -> None:
        self.link.flush(True)

    def event(self, args: tuple[object, ...]) -> None:
        self.send(EVENT, self.call_id(), args)
        self.sent()

    def retire(self) -> None:
        self.link.send(RETIRE, 0, b"")
        self.sent()

    def sent(self) -> None:
        """Something was queued outside of a call's answer."""
        raise NotImplementedError


def publish(server: Server) -> None:
    """Make the functions of `afork.rpc` work here."""
    afork.rpc._server = server
