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
    "one_worker": """\
        hello, anna
        hello, otto
        exit status: 0
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
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(OUTPUT)


@pytest.mark.parametrize("name", sorted(OUTPUT))
def test_example(name, tmp_path):
    path = EXAMPLES / f"{name}.py"
    assert re.match(r'"""[A-Z][^"\n]{20,}[.:]\n', path.read_text()), "no title"
    done = run(path, cwd=tmp_path)
    assert (done.stdout, done.stderr) == (textwrap.dedent(OUTPUT[name]), "")
    assert done.returncode == 0


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
    counts = dict(re.findall(r"^   (\d+) (\d+)$", done.stdout, re.MULTILINE))
    assert {(row[2].replace(",", ""), row[1]) for row in workers} == set(counts.items())
    assert re.search(r"^   2,000 answers in .* 0 refused; 1 lost$", done.stdout, re.M)
    assert not list(tmp_path.iterdir())


def test_command_line_without_a_command(tmp_path):
    done = run("-m", "afork", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("usage: python -m afork [-h] {demo} ...\n")
