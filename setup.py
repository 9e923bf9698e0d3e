"""Builds the kernels (src/headrace/engine/kernels) where there is a C++ compiler; installs go on without one.

Everything else of the package is in pyproject.toml.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = Path("src/headrace/engine/kernels")
SOURCES = sorted(KERNELS.glob("*.cpp"))
HEADERS = sorted(KERNELS.glob("*.h"))


def digest() -> str:
    """Names the sources that a build comes from (`engine/operations/kernels.py` computes the same)."""
    hashed = hashlib.sha256()
    for path in sorted([*SOURCES, *HEADERS], key=lambda path: path.name):
        hashed.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return hashed.hexdigest()[:16]


class BuildKernels(build_ext):
    """A library for ctypes: it has a plain name, whatever the Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"


setup(
    ext_modules=[
        Extension(
            "headrace.engine.kernels.libheadrace",
            sources=[str(path) for path in SOURCES],
            depends=[str(path) for path in [*SOURCES, *HEADERS]],
            define_macros=[("HEADRACE_SOURCES", f'"{digest()}"')],
            # No contraction: a sum must be the same bits in every function that computes it.
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                "-pthread",
                "-fvisibility=hidden",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-Wno-psabi",
            ],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
