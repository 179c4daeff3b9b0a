"""What a process made by afork executes: the handler of the server loop.

Everything here is imported by every template and so is part of every worker:
it loads little, and nothing that registers a callback at fork (threading,
logging, random and asyncio do).
"""

from __future__ import annotations

import atexit
import errno
import os
import sys

from . import _afork, _memory, _worker_socket
from ._version import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import ModuleType
    from typing import Any, NoReturn, TypeAlias

    #: stage, errno, type, message, traceback, filename
    Failure: TypeAlias = tuple[str, int, bytes, bytes, bytes, bytes]

#: What AnyEvent::Fork's `require` sends as code.
PERL_REQUIRE = b'require "$_.pm" for @_'

_STAGES = {
    _afork.CMD_EVAL: "eval",
    _afork.CMD_EVAL_TYPED: "eval",
    _afork.CMD_IMPORT: "require",
    _afork.CMD_SET: "set",
}

#: Whether this process was made by afork.
serving = False

#: Descriptors that the main program had open, in a template forked from it.
inherited: tuple[int, ...] = ()

#: Whether the application's main program is being executed here once more.
loading_main = False
main_loaded = False

#: What 3.15 adds to a missing module where -S was given: not true of us, as
#: the search path is the application's.
_SITE_HINT = (
    ". Site initialization is disabled, did you forget to add the site-packages "
    "directory to sys.path or to enable your virtual environment?"
)

#: Whose frames say nothing to the author of the code in the process.
_OURS = (__file__, os.path.join(os.path.dirname(__file__), "rpc", ""))

#: Source of evaluated code by the file name that tracebacks show.
_sources: dict[str, str] = {}


def _text(value: object) -> bytes:
    return str(value).encode("utf-8", "replace")


def _format(exc: BaseException) -> str:
    """The traceback of an exception, evaluated code included."""
    import linecache
    import traceback
    import warnings

    for name, source in _sources.items():
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    tb = exc.__traceback__
    while tb is not None and tb.tb_frame.f_code.co_filename.startswith(_OURS):
        tb = tb.tb_next
    # Of 3.15, about a __main__ whose loader is no part of a spec: with -W error
    # there would be no traceback.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = "".join(traceback.format_exception(type(exc), exc, tb))
    return text.replace(_SITE_HINT, "")


def _describe(exc: BaseException) -> tuple[bytes, bytes]:
    """Qualified name and message of an exception, whatever its class does."""
    cls = type(exc)
    name = cls.__qualname__
    if cls.__module__ != "builtins":
        name = f"{cls.__module__}.{name}"
    try:
        message = _text(exc)
    except BaseException as broken:  # its __str__ is foreign code
        message = _text(f"<no message: {BaseException.__repr__(broken)}>")
    return _text(name), message


def _failure(stage: str, exc: BaseException) -> Failure:
    name, message = _describe(exc)
    try:
        trace = _text(_format(exc))
    except BaseException:  # the same, or no descriptor left to import with
        trace = b""
    return stage, 0, name, message, trace, b""


def _untag(item: bytes) -> str | bytes:
    """An argument of a typed eval: "b" or "t", then the bytes."""
    if item[:1] == b"b":
        return item[1:]
    return item[1:].decode("utf-8", "surrogatepass")


def _main() -> ModuleType:
    return sys.modules["__main__"]


def _import(name: str) -> ModuleType:
    """The module itself, not the top of its package."""
    module = sys.modules.get(name)
    if module is None:
        __import__(name)
        module = sys.modules[name]
    return module


def _resolve(name: str) -> Any:
    """The object behind "pkg.mod.name", "pkg.mod:name" or "name"."""
    found: Any
    module, colon, path = name.partition(":")
    if colon:
        found = _import(module) if module != "__main__" else _main()
    else:
        module, _, path = name.rpartition(".")
        found = _main()
        # The longest prefix that is a module: the rest are attributes.
        while module and module != "__main__":
            try:
                found = _import(module)
            except ModuleNotFoundError as exc:
                # The missing one may be any of its parents: pkg.mod of
                # pkg.mod.Class.Inner.
                missing = f"{module}.".startswith(f"{exc.name}.")
                if not missing or "." not in module:
                    raise
                module, _, attribute = module.rpartition(".")
                path = f"{attribute}.{path}"
            else:
                break
    for attribute in path.split("."):
        found = getattr(found, attribute)
    if not callable(found):
        raise TypeError(f"{name!r} is not callable")
    return found


class Handler:
    """Called by the server loop in C, see src/binding/server.c."""

    def __init__(self, plain: bool) -> None:
        self.plain = plain
        self.func: Callable[..., object] | None = None
        #: Taken from here by the server.
        self.blank = _worker_socket.blank()
        self.close = _worker_socket.close
        self.adapt = _worker_socket.adapt
        self.count_exit_handlers = atexit._ncallbacks

    # -- commands

    def command(self, letter: int, payload: bytes) -> Failure | None:
        try:
            strings = _afork.unpack_strings(payload)
            if letter == _afork.CMD_EVAL:
                self.eval_plain(strings)
            elif letter == _afork.CMD_EVAL_TYPED:
                args = (
                    item[1:]
                    if item[:1] == b"b"
                    else item[1:].decode("utf-8", "surrogatepass")
                    for item in strings[1:]
                )
                self.eval(strings[0], tuple(args))
            elif letter == _afork.CMD_IMPORT:
                for name in strings:
                    self.require(name.decode())
            else:
                for i in range(0, len(strings), 2):
                    self.set(strings[i].decode(), strings[i + 1])
        except BaseException as exc:
            return self.failed(_STAGES[letter], exc)
        return None

    def failed(self, stage: str, exc: BaseException) -> Failure:
        if self.plain and isinstance(exc, SystemExit):
            end(exit_status(exc))  # nobody could be told but by the status
        failure = _failure(stage, exc)
        if self.plain:
            # The protocol of the original has nowhere else to say it.
            complain(failure[4].decode("utf-8", "replace").rstrip("\n"))
        return failure

    def eval_plain(self, strings: list[bytes]) -> None:
        if not strings:
            return
        if strings[0] == PERL_REQUIRE:
            for name in strings[1:]:
                self.require(name.decode().replace("/", "."))
        else:
            self.eval(strings[0], tuple(strings[1:]))

    def eval(self, code: bytes, args: tuple[object, ...]) -> None:
        source = code.decode("utf-8", "surrogatepass")
        name = f"<afork eval {len(_sources) + 1}>"
        _sources[name] = source
        names = _main().__dict__
        missing = object()
        before = names.get("args", missing)
        names["args"] = args
        try:
            exec(compile(source, name, "exec", dont_inherit=True), names)
        finally:
            # Unless the code has made the name its own.
            if names.get("args") is args:
                if before is missing:
                    del names["args"]
                else:
                    names["args"] = before

    def require(self, name: str) -> None:
        top = __import__(name)
        setattr(_main(), name.partition(".")[0], top)

    def set(self, key: str, value: bytes) -> None:
        if key == "path":
            sys.path[:] = [os.fsdecode(p) for p in _afork.unpack_strings(value)]
            sys.path_importer_cache.clear()
        elif key == "prefix":
            names = ("prefix", "exec_prefix", "base_prefix", "base_exec_prefix")
            for name, prefix in zip(names, _afork.unpack_strings(value), strict=True):
                setattr(sys, name, os.fsdecode(prefix))
        elif key == "site":
            import site

            site.main()
        elif key == "main":
            load_main(value)
        elif key == "env":
            name_, _, text = value.partition(b"=")
            os.environb[name_] = text
        elif key == "unsetenv":
            os.environb.pop(value, None)
        elif key == "cwd":
            os.chdir(os.fsdecode(value))  # as text, which an error shows
        elif key == "umask":
            os.umask(int(value))
        elif key == "rlimit":
            import resource

            which, soft, hard = map(int, value.split())
            resource.setrlimit(which, (soft, hard))
        elif key == "title":
            _afork.set_title(value)
            _afork.keep_title()
        elif key == "freeze":
            _memory.freeze_all()
        elif key == "detach":
            _afork.detach(value == b"1")
        elif key == "hello":
            _afork.report_again()
        elif key == "plain":
            self.plain = True
            _afork.make_plain()
        else:
            raise ValueError(f"unknown setting {key!r}")

    # -- run

    def find(self, name: bytes) -> Failure | None:
        try:
            text = name.decode()
            if self.plain:
                text = text.replace("::", ".")
            self.func = _resolve(text)
        except BaseException as exc:
            return self.failed("run", exc)
        return None

    def finish(self, awaitable: Awaitable[object]) -> None:
        """Run what an async function has returned."""
        import asyncio

        async def main() -> None:
            await awaitable

        asyncio.run(main())

    def broken(self, error: int) -> NoReturn:
        """The stream of commands is of no use any more."""
        if self.plain and error != errno.ECANCELED:  # that one was said already
            complain(os.strerror(error))
        raise SystemExit(1)

    def handle(self, fd: int) -> object:
        from ._handles import arrived

        return arrived(fd)

    def stats(self, facts: dict[str, object]) -> bytes:
        from . import _stats

        return _stats.collect(facts)

    # -- forks

    def before_fork(self, sock: Any) -> bool:
        """Whether the child has exit handlers to forget."""
        self.adapt(sock)
        flush()
        return atexit._ncallbacks() > 0

    def clear_atexit(self, _: None) -> None:
        atexit._clear()


def trial(sock: object) -> None:
    """What a worker runs that shows which of the interpreter's text all use."""


def load_main(packed: bytes) -> None:
    """Load the application's main program here, as multiprocessing does, once.

    Args:
        packed: Of `_interpreter.main_module`.
    """
    global loading_main, main_loaded
    if main_loaded:
        return
    main_loaded = True
    kind, name, *argv = _afork.unpack_strings(packed)
    sys.argv = [arg.decode("utf-8", "surrogatepass") for arg in argv]
    old = _main()
    module = type(sys)("__mp_main__")
    module.__dict__.update(
        {k: v for k, v in old.__dict__.items() if not k.startswith("__")}
    )
    if kind != b"path":
        import importlib.util

        text = os.fsdecode(name)
        if kind == b"entry":  # a folder or a zip file
            from importlib.machinery import PathFinder

            spec = PathFinder.find_spec("__main__", [text])
        else:
            spec = importlib.util.find_spec(text)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot find the main module {text!r}")
        module.__spec__ = spec
        module.__loader__ = spec.loader
        module.__package__ = spec.parent
        module.__file__ = spec.origin
        code = spec.loader.get_code(spec.name)  # type: ignore[attr-defined]
    else:
        import _frozen_importlib_external as files

        path = os.fsdecode(name)
        with open(path, "rb") as file:
            source = file.read()
        compiled = source.startswith(files.MAGIC_NUMBER)  # python program.pyc
        make = files.SourcelessFileLoader if compiled else files.SourceFileLoader
        module.__file__ = path
        # A program has the spec None, for which 3.15 warns in each traceback if
        # the module has another name; and multiprocessing, which looks for the
        # name of the spec, fails in a worker that has none. So one without name.
        module.__loader__ = loader = make("__mp_main__", path)
        namespace: Any = type(sys.implementation)
        module.__spec__ = namespace(name=None, loader=loader, origin=path, parent="")
        if compiled:
            code = loader.get_code("__mp_main__")
        else:
            code = compile(source, path, "exec", dont_inherit=True)
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module
    loading_main = True
    try:
        exec(code, module.__dict__)
    finally:
        loading_main = False


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            pass  # None, closed, or a reader that has gone
    _afork.flush_stdout()  # what C code has printed


def complain(text: str) -> None:
    try:
        sys.stderr.write(f"afork [{os.getpid()}]: {text}\n")
    except (AttributeError, OSError, ValueError):
        pass


def exit_status(exc: BaseException) -> int:
    """What CPython does with an exception that reaches the top."""
    if isinstance(exc, SystemExit):
        code = exc.code
        if code is None:
            return 0
        if isinstance(code, int):
            return code & 0xFF
        complaint = str(code)
    else:
        complaint = _format(exc).rstrip("\n")
    flush()
    try:
        print(complaint, file=sys.stderr)
    except (AttributeError, OSError, ValueError):
        pass
    return 1


def end(status: int) -> NoReturn:
    """End the process as an interpreter ends, except for finalisation.

    Finalising costs milliseconds and would run destructors of objects that
    belong to the template.
    """
    try:
        threading = sys.modules.get("threading")
        if threading is not None:
            threading._shutdown()
        atexit._run_exitfuncs()
    finally:
        flush()
        os._exit(status)


def serve(fd: int, plain: bool, failure: Failure | None = None) -> NoReturn:
    """Serve commands on fd, then enter what they asked for."""
    global serving
    serving = True
    status = 0
    _memory.setup()
    handler = Handler(plain)  # to the end: a worker need not close its socket
    try:
        _afork.serve(fd, plain, handler, failure)
    except BaseException as exc:
        status = exit_status(exc)
    end(status)


def main() -> NoReturn:
    """Entry of an exec'ed interpreter: -c CODE DIRECTORY VERSION FD OWNER."""
    directory, version, fd = sys.argv[1], sys.argv[2], int(sys.argv[3])
    sys.path.remove(directory)
    sys.argv[1:] = []
    for name in ("LD_BIND_NOW", "GLIBC_TUNABLES"):  # for this interpreter only
        os.environ.pop(name, None)
    names = _main().__dict__
    for name in [n for n in names if not n.startswith("__")]:
        del names[name]
    failure = None
    if version != __version__:
        failure = (
            "start",
            0,
            b"TemplateError",
            _text(
                f"the application runs afork {version}, but the installed package "
                f"is {__version__}: restart the application"
            ),
            b"",
            b"",
        )
    else:
        prepare()
    serve(fd, False, failure)


def prepare() -> None:
    """What site would have done, and what every worker needs: once, here."""
    import site

    from . import _atfork, _handles  # noqa: F401

    _atfork.watch()
    site.setquit()
    site.setcopyright()
    site.sethelper()
    _afork.set_title(b"afork: template")
