"""Build steps that pyproject.toml cannot say: protobuf code and Cython extensions."""

import os
import runpy
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildPy(build_py):
    """Generates aoscore/_pb before Python files are collected."""

    def run(self) -> None:
        runpy.run_path(str(ROOT / "proto" / "build.py"))["build"]()
        self.distribution.packages = sorted(
            {
                *self.distribution.packages,
                *(
                    str(path.parent.relative_to(ROOT)).replace("/", ".")
                    for path in (ROOT / "aoscore" / "_pb").rglob("__init__.py")
                ),
            }
        )
        self.packages = self.distribution.packages
        super().run()


def has_header(name: str) -> bool:
    """Whether the compiler that builds us finds a header: where Xen is not, its module is not either."""
    from distutils.ccompiler import new_compiler
    from distutils.sysconfig import customize_compiler

    compiler = new_compiler()
    customize_compiler(compiler)
    command = [*getattr(compiler, "compiler", ["cc"]), "-E", "-x", "c", "-", "-o", os.devnull]
    done = subprocess.run(command, input=f"#include <{name}>\n", text=True, capture_output=True, check=False)
    return done.returncode == 0


def extensions() -> list[Extension]:
    sources = sorted((ROOT / "aoscore" / "_speedups").glob("*.pyx"))
    if not has_header("libxenvchan.h"):
        sources = [path for path in sources if path.stem != "_vchan"]
    if not sources:
        return []
    from Cython.Build import cythonize

    isal = has_header("isa-l/igzip_lib.h")  # inflates twice as fast as zlib
    libraries = {
        "_unpack": ["isal" if isal else "z", "zstd", "crypto"],
        "_chunker": ["crypto"],
        "_frames": ["crypto"],
        "_vchan": ["xenvchan", "xenstore"],
    }
    return cythonize(
        [
            Extension(
                f"aoscore._speedups.{path.stem}",
                [str(path.relative_to(ROOT))],
                libraries=libraries.get(path.stem, []),
                depends=[str(one.relative_to(ROOT)) for one in path.parent.glob("*.h")],
                define_macros=[("AOSCORE_ISAL", "1")] if isal else [],
                extra_compile_args=["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"],
            )
            for path in sources
        ],
        compiler_directives={"language_level": 3},
    )


setup(license="Apache-2.0", cmdclass={"build_py": BuildPy}, ext_modules=extensions())
