"""The C extension; everything else is in pyproject.toml."""

import os
from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "afork._afork",
            sources=sorted(glob("src/core/*.c") + glob("src/binding/*.c")),
            depends=sorted(glob("src/core/*.h") + glob("src/binding/*.h")),
            include_dirs=["src/core"],
            # What is bound lazily is bound again in every forked process.
            extra_link_args=["-Wl,-z,now"],
            extra_compile_args=[
                "-std=c11",
                "-fvisibility=hidden",
                *os.environ.get("AFORK_CFLAGS", "").split(),
            ],
        )
    ]
)
