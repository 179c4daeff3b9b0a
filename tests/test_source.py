"""What the C sources promise about themselves, read from their text."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
SRC = Path(os.environ.get("AFORK_SRC") or TESTS.parent / "src")
DOCS = SRC.parent / "docs"
CORE = sorted((SRC / "core").glob("*.[ch]"))
BINDING = sorted((SRC / "binding").glob("*.[ch]"))
HEADERS = [path for path in CORE if path.suffix == ".h"]

TOKEN = re.compile(
    r"""/\*.*?\*/ | //[^\n]* | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*'""",
    re.DOTALL | re.VERBOSE,
)


def code(path: Path) -> str:
    """Return the text without comments and strings; lines keep their numbers."""
    return TOKEN.sub(lambda m: " " + "\n" * m[0].count("\n"), path.read_text())


def calls(name: str, paths) -> list[str]:
    """Where a function is called (not a field or a longer name that ends so)."""
    pattern = re.compile(rf"(?<![\w.>*]){name}\s*\(")
    return [
        f"{path.name}:{number}"
        for path in paths
        for number, line in enumerate(code(path).splitlines(), 1)
        if pattern.search(line)
    ]


def in_files(places: list[str]) -> list[str]:
    return [place.split(":")[0] for place in places]


def test_the_sources_are_there():
    assert len(CORE) > 20
    assert len(BINDING) > 3


def test_core_knows_no_python():
    for path in CORE:
        text = code(path)
        assert "Python.h" not in path.read_text().replace("no Python.h", ""), path
        assert not re.search(r"\b_?Py[A-Z_]\w*", text), path


def test_one_fork_and_one_vfork():
    assert in_files(calls("fork", CORE + BINDING)) == ["server.c"]
    assert in_files(calls("vfork", CORE + BINDING)) == ["spawn.c"]
    for name in ("forkpty", "daemon", "system", "popen", "clone", "clone3", "_Fork"):
        assert calls(name, CORE + BINDING) == [], name
    assert calls("posix_spawnp?", CORE + BINDING) == []


def test_control_sockets_are_read_and_written_in_one_place():
    for name in ("recvmsg", "sendmsg"):
        assert in_files(calls(name, CORE + BINDING)) == ["fdpass.c"], name
    for name in ("recv", "recvfrom", "recvmmsg", "readv", "send", "sendto", "writev"):
        assert calls(name, CORE) == [], name
    # A status pipe and files of /proc and /sys are no sockets.
    files = {"spawn.c", "proctitle.c", "hugepage.c", "image.c"}
    assert set(in_files(calls("read", CORE))) == files
    assert in_files(calls("write", CORE)) == ["spawn.c"]
    for path in CORE:
        assert not re.search(r"\bMSG_(PEEK|WAITALL)\b", code(path)), path
        assert "SOCK_SEQPACKET" not in code(path), path
    (fdpass,) = [code(p) for p in CORE if p.name == "fdpass.c"]
    assert fdpass.count("MSG_NOSIGNAL") == fdpass.count("MSG_CMSG_CLOEXEC") == 1


def test_core_never_prints_and_never_exits():
    for name in ("printf", "fprintf", "puts", "perror", "abort", "exit", "assert"):
        assert calls(name, CORE) == [], name
    # After vfork, when the parent has gone, and in the copy that makes a trial.
    assert set(in_files(calls("_exit", CORE))) == {
        "spawn.c",
        "serve_forks.c",
        "serve_image.c",
    }


def test_descriptors_are_close_on_exec_from_birth():
    for name in ("open", "openat", "pipe2", "socketpair", "dup3"):
        for path in CORE + BINDING:
            for match in re.finditer(rf"(?<![\w.>]){name}\s*\([^;]*;", code(path)):
                assert "CLOEXEC" in match[0], f"{path.name}: {match[0]}"
    for name in ("pipe", "dup", "accept", "socket", "eventfd", "creat"):
        assert calls(name, CORE + BINDING) == [], name
    for path in CORE + BINDING:
        for mode in re.findall(r"\bfopen\([^;]*, \"(\w+)\"\)", path.read_text()):
            assert mode.endswith("e"), path
    # dup2 makes what a program is to inherit, and nothing else.
    assert set(in_files(calls("dup2", CORE))) <= {"spawn.c"}


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.name)
def test_header_compiles_alone(path):
    compiler = shlex.split(os.environ.get("CC", "cc"))
    # Whoever includes one has said first which system it is.
    flags = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
    command = [*compiler, *flags, "-fsyntax-only", "-x", "c", "-"]
    # Twice: the guard works.
    text = f'#include "{path}"\n#include "{path}"\ntypedef int not_empty;\n'
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_files_are_short():
    for path in CORE + BINDING:
        assert path.read_text().count("\n") < 500, path


def test_exported_names_have_our_prefix():
    """What crosses files is afork_noun_verb or AFORK_NAME; static the rest."""
    for path in HEADERS:
        text = code(path)
        for name in re.findall(r"^#define\s+(\w+)", text, re.MULTILINE):
            assert name.startswith("AFORK_"), f"{path.name}: {name}"
        for name in re.findall(r"^(?:\w[\w ]*[ *])?(\w+)\(", text, re.M):
            assert name.startswith(("afork_", "AFORK_")), f"{path.name}: {name}"


# The letters, here and in the documentation


def letters_of_source() -> dict[str, dict[str, str]]:
    """Return {"COMMANDS": {letter: name}, "REPORTS": ...} of wire.h."""
    text = (SRC / "core" / "wire.h").read_text()
    tables = {}
    for kind, body in re.findall(
        r"#define AFORK_(COMMANDS|REPORTS)\(X\)(.*?)\n\n", text, re.S
    ):
        rows = re.findall(r"X\((\w+), '(.)', \"", body)
        tables[kind] = {letter: name for name, letter in rows}
        assert len(tables[kind]) == len(rows), "a letter stands for two"
    return tables


def letters_of_manual() -> dict[str, dict[str, str]]:
    text = (DOCS / "protocol.rst").read_text()
    tables = {}
    for title in ("Commands", "Reports"):
        underline = "=" * len(title)
        section = text.split(f"\n{title}\n{underline}\n", 1)[1]
        section = re.split(r"\n(?=[^\n]+\n(={3,}|-{3,})\n)", section)[0]
        rows = re.findall(r"\* - ``(.)``\n +- (\w+)\n", section)
        tables[title.upper()] = dict(rows)
        assert len(tables[title.upper()]) == len(rows)
    return tables


def test_letters_are_documented():
    if not (DOCS / "protocol.rst").exists():
        pytest.skip("no docs/protocol.rst here")
    source = letters_of_source()
    assert len(source["COMMANDS"]) > 5
    assert source == letters_of_manual()


def test_places_of_descriptors_are_documented():
    if not (DOCS / "protocol.rst").exists():
        pytest.skip("no docs/protocol.rst here")
    text = (DOCS / "protocol.rst").read_text()
    rows = re.findall(r"\* - ``.``\n +- (\w+)\n +- ([^*]*)", text)
    documented = {
        name: where
        for name, rest in rows
        for where in re.findall(r"descriptor (first|behind)", rest)
    }
    wire = code(SRC / "core" / "wire.c")
    body = wire[wire.index("afork_wire_carry(") :]
    body = body[: body.index("\n}")]
    assert set(re.findall(r"AFORK_(?:CMD|REP)_(\w+)", body)) == set(documented)
    header = (SRC / "core" / "wire.h").read_text()
    for name, where in documented.items():
        (text,) = re.findall(rf"X\({name}, '.', \"([^\"]*)\"", header)
        assert ("on the first byte" in text) == (where == "first"), name
        assert ("follows" in text) == (where == "behind"), name
