"""Which Python a template runs, how it is started, and what it is told.

A module that can be imported in the application must be importable in its
processes, yet no line of foreign code may run before the application's path
has arrived. So the interpreter starts isolated and without site; the path and
what else belongs to the application's import state follow as the first frame.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import afork

from . import _afork, _memory
from ._handles import is_stream
from ._process import Process
from ._version import __version__

#: Nothing but the standard library comes before our own directory.
_BOOT = (
    "import sys; sys.path.append(sys.argv[1]); import afork._child; afork._child.main()"
)

#: Number of its socket in a new interpreter.
_FAR = 3

#: Finders on sys.meta_path that hook nothing a worker needs to import.
_HARMLESS_FINDERS = ("_distutils_hack", "_pytest", "importlib", "six", "_frozen")


def find_python() -> str:
    """Path of the interpreter to run.

    ``afork.python`` if it is set; else ``sys.executable``, unless that is
    empty or the name of another program that embeds Python.
    """
    if afork.python is not None:
        return os.fspath(afork.python)
    base = getattr(sys, "_base_executable", None)
    for path in (sys.executable, base):
        if path and os.path.basename(path).startswith(("python", "pypy")):
            return path
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    path = os.path.join(sys.base_exec_prefix, "bin", version)
    if os.path.exists(path):
        return path
    raise FileNotFoundError(
        2,
        f"no Python found (sys.executable is {sys.executable!r}): set afork.python",
        path,
    )


def find_program(name: str | bytes) -> str | bytes:
    """Path of a program: as it is if it has a slash, else by our PATH."""
    import shutil

    found = shutil.which(os.fsdecode(name))
    # What is not found is for execve to refuse, with the name that was given.
    return name if found is None else found


def _flags() -> list[str]:
    """-O, -W, -X and the like, as multiprocessing passes them on."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    flags = [f for f in flags if f not in ("-I", "-s", "-S", "-E", "-P")]
    if sys.flags.utf8_mode and "-Xutf8" not in flags:
        flags += ["-X", "utf8"]
    return flags


def spawn(
    command: list[str | bytes], env: dict[bytes, bytes], plain: bool = False
) -> Process:
    """Start a program on the far end of a new socket; it is our child.

    The number of its socket and our pid are appended to its arguments.
    """
    import socket

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        channel_fd = ours.detach()
        try:
            argv = [os.fsencode(x) for x in command]
            argv += [b"%d" % _FAR, b"%d" % os.getpid()]
            with _stdio() as fds:
                pid = _afork.spawn(
                    argv[0],
                    tuple(argv),
                    tuple(b"%s=%s" % item for item in env.items()),
                    (*fds, (theirs.fileno(), _FAR)),
                )
        except BaseException:
            os.close(channel_fd)
            raise
    try:
        process = Process(_afork.Channel(channel_fd, plain), plain=plain)
        process.watch()
    except BaseException:
        _undo(pid)
        raise
    process.pid = pid
    process.direct = True
    try:
        process.pidfd = os.pidfd_open(pid)
        process.watch_exit()
    except BaseException:
        _undo(pid)
        process.gone = True
        process._close()
        process.on_exited(None, None)
        raise
    return process


def _undo(pid: int) -> None:
    """A child that there is no descriptor left to talk to."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


class _stdio:
    """The stdio of this process for a child; /dev/null where one is closed.

    Otherwise the child's next descriptor would take the number, and whatever
    prints would write into a socket.
    """

    def __enter__(self) -> list[tuple[int, int]]:
        self.null = -1
        fds = []
        for number in (0, 1, 2):
            if is_stream(number):
                fds.append((number, number))
                continue
            if self.null < 0:
                self.null = os.open(os.devnull, os.O_RDWR)
            fds.append((self.null, number))
        return fds

    def __exit__(self, *exc_info: object) -> None:
        if self.null >= 0:
            os.close(self.null)


def spawn_template(python: str | None = None) -> Process:
    """Start an interpreter as a template and tell it how we import.

    Raises:
        OSError: the interpreter cannot be executed; ``filename`` is its path.
    """
    python = python or find_python()
    directory = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command: list[str | bytes] = [python, *_flags(), "-I", "-S", "-c", _BOOT]
    # What ld.so binds lazily it would bind again in every forked process, at
    # the price of a dozen page faults; _child.main takes it out again.
    env = {**os.environb, b"LD_BIND_NOW": b"1"}
    if _memory.needs_tunable():
        theirs = os.environb.get(b"GLIBC_TUNABLES")
        env[b"GLIBC_TUNABLES"] = _memory.tunables(theirs)
    process = spawn([*command, directory, __version__], env)
    assert process.channel is not None
    settings = [
        b"prefix",
        _pack(sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix),
    ]
    for name in (b"LD_BIND_NOW", b"GLIBC_TUNABLES"):
        if name in os.environb:
            settings += [b"env", name + b"=" + os.environb[name]]
    if needs_site():
        settings += [b"site", b""]
    process.channel.strings(_afork.CMD_SET, settings)
    update_path(process)
    return process


def needs_site() -> bool:
    """Whether imports here go through a hook that site has installed.

    Editable installs of some build tools put a finder on ``sys.meta_path`` by
    a .pth file. Otherwise the search path says it all, and processing site
    again would make every start and every fork dearer.
    """
    for finder in sys.meta_path:
        module = getattr(finder, "__module__", type(finder).__module__)
        if not str(module).startswith(_HARMLESS_FINDERS):
            return True
    return False


def update_path(process: Process) -> None:
    """Queue the application's sys.path unless the process has it."""
    if process.plain or process.channel is None:
        return
    entries = _entries()
    if process.path != entries:
        process.path = entries
        process.channel.strings(_afork.CMD_SET, [b"path", _pack(*entries)])


#: The sys.path looked at last, the working directory if that had a part in the
#: result, and the result: asked for at every start.
_seen: tuple[list[str], str | None, list[str]] = ([], None, [])


def _entries() -> list[str]:
    """The application's sys.path as its processes have to spell it."""
    global _seen
    raw, directory, entries = _seen
    if raw == sys.path and (directory is None or directory == _directory()):
        return entries
    raw, directory, entries = list(sys.path), None, []
    for entry in raw:
        if not isinstance(entry, str):
            continue
        if not entry.startswith("/"):
            # '' is the working directory of whoever looks, but only we mean ours.
            directory = _directory()
            if not directory:
                continue  # it has been removed, and all that was in it
            entry = os.path.normpath(os.path.join(directory, entry))
        entries.append(entry)
    _seen = raw, directory, entries
    return entries


def _directory() -> str:
    """The working directory, or "" once it has been removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


def _pack(*paths: str) -> bytes:
    return _afork.pack_strings([os.fsencode(p) for p in paths])


def main_module() -> bytes:
    """How a process can load the application's main program.

    Returns:
        For `_child.load_main`: kind, name, and the arguments of the program.

    Raises:
        TypeError: it cannot be loaded.
    """
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    path = getattr(main, "__file__", None)
    if spec is not None and spec.name == "__main__" and path:
        found = [b"entry", os.fsencode(os.path.dirname(os.path.abspath(path)))]
    elif spec is not None and spec.name:
        found = [b"name", spec.name.encode()]
    elif path and os.path.exists(path):  # "<stdin>" is none
        found = [b"path", os.fsencode(os.path.abspath(path))]
    else:
        raise TypeError(
            "functions of __main__ can only be run when it is a file or a module "
            "that a process can load: this one was typed in, read from standard "
            "input or given with -c"
        )
    for arg in getattr(sys, "argv", ()):
        found.append(str(arg).encode("utf-8", "surrogatepass"))
    return _afork.pack_strings(found)
