"""Whatever the documentation shows runs: examples/, README.rst, the demo."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import afork

from .conftest import HANG, SCRIPTS

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
README = ROOT / "README.rst"

#: What each example prints.
OUTPUT = {
    "executor": """\
        anna    4f900a659f61
        otto    7ece3becff1b
        hannah  e6cab0ec549f
        cancelled while it ran: True
        divmod: [(2, 6), (3, 0), (3, 1)]
        """,
    "one_worker": """\
        hello, anna
        hello, otto
        exit status: 0
        """,
    "pool_timeout": """\
        results: [4, 9]
        timeout: the call has run for 0.2 s
        cancelled
        crashed: SIGSEGV
        and on it goes: [0.0, 2.6, 3.7, 4.6, 5.3, 5.9, 6.5, 7.0]
        10 done, 1 cancelled, 1 lost
        """,
    "rpc_progress": """\
        360
           factor 2, 180 left
           factor 2, 90 left
           factor 2, 45 left
           factor 3, 15 left
           factor 3, 5 left
           factor 5, 1 left
           [2, 2, 2, 3, 3, 5]
        1001
           factor 7, 143 left
           factor 11, 13 left
           factor 13, 1 left
           [7, 11, 13]
        TypeError: '>' not supported between instances of 'str' and 'int'
        """,
    "run_programs": """\
        exit status: 3
        output: hi from /
        errors: nothing to complain about
        not found: no-such-program
        """,
    "same_file": """\
        computed: 5! = 120
        computed: 10! = 3628800
        computed: 20! = 2432902008176640000
        error: NameError name 'nine' is not defined
        """,
    "server_pool": """\
        100 connections served
        by our servers only: True
        exit statuses: [-15, -15, -15, -15]
        """,
    "single_file": """\
        afork bgpsl chqtm dirun ejsvo fktwp gluxq hmvyr inwzs joxat
        a new process is empty
        """,
    "streaming": """\
        27 comes down to 1 in 111 steps, from 9232
        """,
    "subprocess_exec": """\
        sorted: ['9', '10', '100']
        line: one
        line: two
        exit status: 4
        terminated: -15
        at once: 0 of 20 failed
        """,
}


def run(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """In a fresh interpreter, of the package under test.

    Without -X dev: on a busy machine asyncio would complain of slow callbacks.
    """
    return subprocess.run(
        [sys.executable, "-W", "error", *args],
        capture_output=True,
        text=True,
        timeout=3 * HANG,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(afork.__file__).parent.parent)},
    )


def test_each_example_is_known():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {*OUTPUT, "test_with_pool"}


@pytest.mark.parametrize("name", sorted(OUTPUT))
def test_example(name, tmp_path):
    path = EXAMPLES / f"{name}.py"
    assert re.match(r'"""[A-Z][^"\n]{20,}[.:]\n', path.read_text()), "no title"
    done = run(path, cwd=tmp_path)
    assert (done.stdout, done.stderr) == (textwrap.dedent(OUTPUT[name]), "")
    assert done.returncode == 0


def test_example_for_pytest(tmp_path):
    path = EXAMPLES / "test_with_pool.py"
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", path, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


# -- README.rst


def programs() -> list[tuple[str, str]]:
    """Whole programs among the code blocks, by the title that they stand under."""
    found = []
    title, lines = "", README.read_text().splitlines()
    for i, line in enumerate(lines):
        if re.fullmatch(r"([-=~^])\1{2,}", line) and i and lines[i - 1].strip():
            title = lines[i - 1]
        if line == ".. code-block:: python":
            block = []
            for text in lines[i + 1 :]:
                if text and not text.startswith(" "):
                    break
                block.append(text)
            source = textwrap.dedent("\n".join(block)).strip() + "\n"
            if "asyncio.run(" in source:
                found.append((title, source))
    return found


PROGRAMS = programs()


def test_readme_has_programs():
    assert len(PROGRAMS) >= 5


@pytest.mark.parametrize("source", [pytest.param(s, id=title) for title, s in PROGRAMS])
def test_program_of_the_readme(source, tmp_path):
    modules = SCRIPTS / "readme_modules"  # that the programs import by name
    if modules.is_dir():
        shutil.copytree(modules, tmp_path, dirs_exist_ok=True)
    (tmp_path / "program.py").write_text(source)
    done = run("program.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout


# -- python -m afork demo


def test_demo(tmp_path):
    done = run("-m", "afork", "demo", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert done.stdout.endswith("\nEverything as promised.\n")
    assert "BROKEN" not in done.stdout

    rows = [
        re.split(r" {2,}", line)
        for line in done.stdout.splitlines()
        if re.match(r"(template|worker \d|program) {2,}\d", line)
    ]
    names = ["template", *(f"worker {n}" for n in range(1, 6)), "program"]
    assert [row[0] for row in rows] == names
    assert len({row[1] for row in rows}) == 7  # pids
    workers = rows[1:6]
    assert sum(int(row[2].replace(",", "")) for row in workers) == 2000
    assert all(int(row[2].replace(",", "")) > 0 for row in workers)
    assert all(float(row[3]) > 0 for row in rows)
    for row in rows[:6]:
        private, shared, pss = (int(n.replace(",", "")) for n in row[4:7])
        # The table of 8 MB is there once.
        assert shared > 8_000 > private > 0
        assert private < pss < private + shared
    assert sorted(row[7] for row in workers) == ["-9 (SIGKILL)", *4 * "0"]
    assert rows[0][7] == rows[6][7] == "0"

    # A program has counted the same.
    counts = set(re.findall(r"^   (\d+) (\d+)$", done.stdout, re.MULTILINE))
    assert {(row[2].replace(",", ""), row[1]) for row in workers} == counts
    assert re.search(r"^   2,000 answers in .* 0 refused; 1 lost$", done.stdout, re.M)
    assert not list(tmp_path.iterdir())


def test_command_line_without_a_command(tmp_path):
    done = run("-m", "afork", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("usage: python -m afork [-h] {demo,ps,tree} ...\n")
