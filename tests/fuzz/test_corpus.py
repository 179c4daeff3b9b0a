"""The fuzzers' seed corpus, replayed without libFuzzer by the ordinary suite."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from ..core import build_core

HERE = Path(__file__).parent
HARNESSES = sorted(path.stem for path in HERE.glob("fuzz_*.c"))


def replay(name: str, files) -> None:
    program = build_core.replay_program(HERE / f"{name}.c")
    done = subprocess.run(
        [program, *map(str, files)], capture_output=True, text=True, timeout=40
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == len(files)


def corpus(name: str) -> list[Path]:
    return sorted((HERE / "corpus" / name).iterdir())


def test_there_are_harnesses():
    assert len(HARNESSES) == 4
    assert sorted(os.listdir(HERE / "corpus")) == HARNESSES


@pytest.mark.parametrize("name", HARNESSES)
def test_corpus(name):
    files = corpus(name)
    assert files
    replay(name, files)


@pytest.mark.parametrize("name", HARNESSES)
def test_damaged_corpus(name, tmp_path):
    """The same with a byte changed, cut or doubled here and there."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    seeds = [path.read_bytes() for path in corpus(name)]
    for number in range(300):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data) + 1)
            match rng.randrange(4):
                case 0:
                    data[at : at + 1] = bytes([rng.choice([0, 1, 127, 128, 255])])
                case 1:
                    del data[at : at + rng.randint(1, 20)]
                case 2:
                    data[at:at] = data[at : at + rng.randint(1, 20)]
                case 3:
                    data[at : at + 1] = rng.randbytes(1)
        (tmp_path / str(number)).write_bytes(data)
    replay(name, sorted(tmp_path.iterdir()))
