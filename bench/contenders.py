"""Who runs, and how each is started. The order is the order of a round."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from meter import Unavailable

HERE = Path(__file__).resolve().parent
SMALL, LARGE = 20, 1024  # MB of the application

WORKERS = "workers: socketpair, start, child exits at once, wait for EOF"
PROGRAMS = "programs: /bin/true, stdio on /dev/null, wait for its status"
FAULTS = "faults: until the await raises"


@dataclass(frozen=True)
class Job:
    """What a command line is made of, besides the contender."""

    limits: Path | None
    seconds: float
    count: int


@dataclass(frozen=True)
class Contender:
    key: str
    label: str
    scenario: str
    command: Callable[[Job], list[str]]
    inflight: int = 1
    app_mb: int = 0  # 0: as large as it is by itself


def limits_command(
    mode: str,
    inflight: int = 1,
    mb: int = 0,
    program: list[str] | None = None,
    cpus: int = 0,
) -> Callable[[Job], list[str]]:
    def command(job: Job) -> list[str]:
        if job.limits is None:
            raise Unavailable("no C compiler")
        options = [
            "--inflight",
            str(inflight),
            "--mb",
            str(mb),
            "--cpus",
            str(cpus),
            "--seconds",
            str(job.seconds),
        ]
        return [
            str(job.limits),
            mode,
            *options,
            "--count",
            str(job.count),
            *(["--", *program] if program else []),
        ]

    return command


def same_image_command(inflight: int) -> Callable[[Job], list[str]]:
    def command(job: Job) -> list[str]:
        if job.limits is None:
            raise Unavailable("no C compiler")
        return [
            sys.executable,
            str(HERE / "same_image.py"),
            str(job.limits),
            str(inflight),
            str(job.seconds),
            str(job.count),
        ]

    return command


def lean_command(inflight: int, gap: float = 0.0) -> Callable[[Job], list[str]]:
    """With a gap: the time to each first byte."""
    script = str(HERE / "lean_fork.py")

    def command(job: Job) -> list[str]:
        options = [inflight, job.seconds, job.count, *([gap] if gap else [])]
        return [sys.executable, "-I", "-S", script, *map(str, options)]

    return command


def perl_command(
    method: str, inflight: int, gap: float = 0.0
) -> Callable[[Job], list[str]]:
    """With a gap: the time to each first byte."""

    def command(job: Job) -> list[str]:
        perl = shutil.which("perl")
        if perl is None:
            raise Unavailable("no perl")
        options = [method, inflight, job.seconds, job.count, *([gap] if gap else [])]
        return [perl, str(HERE / "anyevent_fork.pl"), *map(str, options)]

    return command


def app_command(
    function: str, inflight: int = 1, mb: int = SMALL, script: bool = False
) -> Callable[[Job], list[str]]:
    def command(job: Job) -> list[str]:
        options = [
            "--mb",
            str(mb),
            "--inflight",
            str(inflight),
            "--seconds",
            str(job.seconds),
        ]
        launch = [str(HERE / "app.py")] if script else ["-c", "import app; app.main()"]
        return [sys.executable, *launch, function, *options, "--count", str(job.count)]

    return command


def _python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]


def _workers() -> list[Contender]:
    """Key, label, command for a number in flight; each one at a time and, where it
    makes sense, 16 in flight.
    """
    many: list[tuple[str, str, Callable[[int], Callable[[Job], list[str]]], int]] = [
        (
            "c-fork",
            "C: socketpair + fork, static, 5 MB",
            lambda k: limits_command("fork", k, 5),
            0,
        ),
        ("c-image", "C: the same, in our template's image", same_image_command, 0),
        ("os-fork", "os.fork, python -I -S", lean_command, 0),
        ("perl-new", "Perl AnyEvent::Fork->new", lambda k: perl_command("new", k), 0),
        (
            "perl-exec",
            "Perl AnyEvent::Fork->new_exec",
            lambda k: perl_command("new_exec", k),
            0,
        ),
        (
            "forkserver",
            "multiprocessing forkserver, preloaded",
            lambda k: app_command("peers.forkserver", k),
            SMALL,
        ),
        (
            "billiard",
            "billiard forkserver",
            lambda k: app_command("peers.billiard", k),
            SMALL,
        ),
        (
            "afork-new",
            "afork Fork.new",
            lambda k: app_command("peers.afork_new", k),
            SMALL,
        ),
        (
            "afork-new-uvloop",
            "afork Fork.new, uvloop",
            lambda k: app_command("peers.afork_new_uvloop", k),
            SMALL,
        ),
        (
            "afork-import",
            "afork Fork.new, worker imports a module",
            lambda k: app_command("peers.afork_import", k),
            SMALL,
        ),
        (
            "afork-preloaded",
            "afork fork of a preloaded template",
            lambda k: app_command("peers.afork_preloaded", k),
            SMALL,
        ),
        (
            "afork-exec",
            "afork Fork.new_exec",
            lambda k: app_command("peers.afork_exec", k),
            SMALL,
        ),
    ]
    listed = [
        Contender(f"{key}/{k}", label, WORKERS, command(k), k, mb)
        for key, label, command, mb in many
        for k in (1, 16)
    ]
    single = [
        (
            "forkserver-script/1",
            "multiprocessing forkserver, main file",
            app_command("peers.forkserver", script=True),
            SMALL,
        ),
        (
            "pebble/1",
            "pebble concurrent.process, preloaded",
            app_command("peers.pebble"),
            SMALL,
        ),
        ("loky/1", "loky, a pool of one", app_command("peers.loky"), SMALL),
        ("spawn/1", "multiprocessing spawn", app_command("peers.spawn"), SMALL),
        (
            "afork-new@1g/1",
            "afork Fork.new",
            app_command("peers.afork_new", mb=LARGE),
            LARGE,
        ),
        (
            "python-pass/1",
            "C: posix_spawn python -I -S -c pass",
            limits_command("spawn", program=_python("pass")),
            0,
        ),
        (
            "python-exit/1",
            "C: posix_spawn python -I -S, os._exit",
            limits_command("spawn", program=_python("import os; os._exit(0)")),
            0,
        ),
    ]
    return listed + [
        Contender(key, label, WORKERS, command, 1, mb)
        for key, label, command, mb in single
    ]


def _programs() -> list[Contender]:
    listed = [
        Contender(
            f"c-spawn@{name}",
            "C: posix_spawn",
            PROGRAMS,
            limits_command("spawn", mb=mb, program=["/bin/true"]),
            1,
            mb,
        )
        for name, mb in (("20m", SMALL), ("1g", LARGE))
    ]
    for key, label, function in (
        ("run", "subprocess.run", "programs.subprocess_run"),
        ("asyncio", "asyncio.create_subprocess_exec", "programs.asyncio_exec"),
        ("uvloop", "the same under uvloop", "programs.uvloop_exec"),
        (
            "afork-program",
            "afork.create_subprocess_exec",
            "programs.afork_exec_program",
        ),
        (
            "afork-program-uvloop",
            "the same under uvloop",
            "programs.afork_exec_program_uvloop",
        ),
    ):
        for name, mb in (("20m", SMALL), ("1g", LARGE)):
            listed.append(
                Contender(
                    f"{key}@{name}",
                    label,
                    PROGRAMS,
                    app_command(function, mb=mb),
                    1,
                    mb,
                )
            )
    return listed


def contenders() -> list[Contender]:
    return [
        *_workers(),
        *_programs(),
        Contender(
            "afork-faults", "afork", FAULTS, app_command("faults.faults"), 1, SMALL
        ),
    ]
