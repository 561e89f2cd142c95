"""Builds the extension grpo_engine._C with CMake. Everything declarative is in pyproject.toml."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext


def tool(name: str) -> str:
    """Path of a build tool: the one installed beside this Python before the system's."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if found is None:
        sys.exit(f"grpo-engine: the build needs {name}: pip install {name}")
    return found


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        build_folder = Path(self.build_temp).resolve()
        # Every path is passed on each configure: pip's isolated builds move the tools about, and a
        # path remembered in CMakeCache.txt from the last build would be stale.
        configure = [
            f"-S{Path(__file__).resolve().parent}",
            f"-B{build_folder}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DGRPO_ENGINE_VERSION={self.distribution.get_version()}",
            f"-DGRPO_ENGINE_OUTPUT={Path(self.get_ext_fullpath(ext.name)).resolve().parent}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        for arguments in (configure, ["--build", str(build_folder)]):
            if subprocess.run([tool("cmake"), *arguments]).returncode != 0:
                sys.exit("grpo-engine: building grpo_engine._C failed; CMake's message is above")


setup(
    packages=[*find_packages(include=["grpo_engine", "grpo_engine.*"]), "grpo_engine.kernels"],
    package_dir={"grpo_engine.kernels": "kernels"},
    ext_modules=[Extension("grpo_engine._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
