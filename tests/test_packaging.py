"""What a user installs: the wheel, made from the sdist, used from outside the repository."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from grpo_engine import _C

ROOT = Path(__file__).resolve().parents[1]
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="the tests of the package need its sources"
)


def run(arguments, cwd, **environment):
    """Run and return the completed process; its output goes into the failure message."""
    done = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=cwd,
        env={**os.environ, "GRPO_ENGINE_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )
    return done


def succeed(arguments, cwd, **environment):
    done = run(arguments, cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(what, source, out):
    """One of the build backend's hooks: what pip calls, here without a fresh environment."""
    hook = f"from setuptools import build_meta; print(build_meta.build_{what}({str(out)!r}))"
    succeed([sys.executable, "-c", hook], cwd=source)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """From a copy: a build leaves metadata and objects beside the sources."""
    source = tmp_path_factory.mktemp("source") / "grpo-engine"
    skipped = shutil.ignore_patterns(".*venv*", ".git", "build", "runs", "*.so", "__pycache__")
    shutil.copytree(ROOT, source, ignore=skipped)
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Folder to put on sys.path. A wheel of this kind is installed by unpacking it."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def shipped_sources():
    """Path in the wheel of every file of the package in the repository."""
    files = {}
    for folder, package in (("grpo_engine", "grpo_engine"), ("kernels", "grpo_engine/kernels")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so":
                files[f"{package}/{path.relative_to(ROOT / folder).as_posix()}"] = path
    return files


def test_wheel_holds_the_package_and_nothing_else(wheel):
    archive = zipfile.ZipFile(wheel)
    names = {name for name in archive.namelist() if ".dist-info/" not in name}
    extension = "grpo_engine/_C" + sysconfig.get_config_var("EXT_SUFFIX")
    sources = shipped_sources()
    assert names == {*sources, extension}
    for name, path in sources.items():
        assert archive.read(name) == path.read_bytes(), name


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    mandatory = {
        line.removeprefix("Requires-Dist: ").split(">")[0]
        for line in lines
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    }
    short = {"torch", "transformers", "safetensors", "numpy", "pydantic", "pyyaml", "rich"}
    assert mandatory == short
    assert "License-Expression: Apache-2.0" in lines
    for extra in ("language", "all"):
        assert extra in {line.removeprefix("Provides-Extra: ") for line in lines}
    (lingua,) = (line for line in lines if "lingua-language-detector" in line)
    assert lingua.endswith('extra == "language"')
    folder = metadata.rsplit("/", 1)[0]
    entry_points = archive.read(f"{folder}/entry_points.txt").decode()
    assert "grpo-engine = grpo_engine.cli:main" in entry_points
    assert f"{folder}/licenses/LICENSE" in archive.namelist()


def test_sdist_holds_what_a_build_and_a_test_run_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    needed = ["setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "CHANGELOG.md", "Makefile"]
    needed += [f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()]
    needed += ["kernels/__init__.py", "README.md", "tests/aot_resources.json", ".clang-format"]
    needed += [
        f"{folder}/{path.name}"
        for folder in ("tests", "benchmarks")
        for path in (ROOT / folder).glob("*.py")
    ]
    assert set(needed) <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


IMPORTS = """
    import sys
    import grpo_engine, grpo_engine.kernels.packing as packing
    from grpo_engine import _C
    place = sys.argv[1]
    for module in (grpo_engine, packing, _C):
        assert module.__file__.startswith(place), module.__file__
    assert packing.pack_rollouts([[1, 2], [3]]).position_ids.tolist() == [0, 1, 0]
    assert not _C.built_with_cuda and _C.cuda_architectures == []
    assert _C.version == grpo_engine.__version__ == grpo_engine.kernels.__version__
"""


def test_wheel_works_from_outside_the_repository(installed, tmp_path):
    script = textwrap.dedent(IMPORTS)
    succeed([sys.executable, "-c", script, installed], cwd=tmp_path, PYTHONPATH=str(installed))


HUGGING_FACE = """
    import importlib, sys
    import kernels, grpo_engine.kernels
    assert kernels.get_kernel() == "theirs", kernels.__file__
    assert grpo_engine.kernels is not kernels
    assert not hasattr(grpo_engine.kernels, "get_kernel")
    from transformers.utils import import_utils
    import_utils.is_kernels_available()
"""


def test_wheel_beside_hugging_face_kernels(installed, tmp_path):
    """Both are called kernels; only theirs is a top-level module."""
    theirs = tmp_path / "site" / "kernels"
    theirs.mkdir(parents=True)
    (theirs / "__init__.py").write_text(
        "__version__ = '0.11.0'\ndef get_kernel():\n    return 'theirs'\n"
    )
    path = os.pathsep.join([str(installed), str(theirs.parent)])
    script = textwrap.dedent(HUGGING_FACE)
    succeed([sys.executable, "-c", script], cwd=tmp_path, PYTHONPATH=path)


def test_transformers_survives_the_repository_root_on_sys_path():
    """A notebook in the root, or python -m, puts our folder kernels/ where transformers probes for
    Hugging Face's package and reads its version."""
    script = """
        import kernels
        from transformers.utils import import_utils
        import_utils.is_kernels_available()
        assert kernels.__version__
    """
    succeed([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, PYTHONPATH=str(ROOT))


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_gpu_runs_every_file_whose_tests_take_a_device():
    """Most of those tests carry no mark, so no mark can select them."""
    commands = succeed(["make", "-n", "gpu"], cwd=ROOT)
    takes_a_device = re.compile(r"^def test_\w+\([^)]*\bdevice\b", re.MULTILINE)
    for path in (ROOT / "tests").glob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        if takes_a_device.search(text) and '"device"' not in text:  # the fixture, no parameter
            assert f" tests/{path.name}" in commands, path.name
        if re.search(r"^@pytest\.mark\.gpu\b", text, re.MULTILINE):  # without the slow ones
            assert f" tests/{path.name}" in commands, path.name
    for named in re.findall(r"tests/test_\w+\.py", commands):
        assert (ROOT / named).exists(), named


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_demo_replaces_the_run_of_the_last_one():
    commands = succeed(["make", "-n", "demo"], cwd=ROOT)  # inside another make: more lines follow
    assert re.search(r"grpo --recipe \S+ --overwrite$", commands, re.MULTILINE)


def test_versions_agree():
    import grpo_engine.kernels

    assert _C.version == grpo_engine.__version__ == grpo_engine.kernels.__version__


@pytest.mark.skipif(
    NVCC is None or os.environ.get("GRPO_ENGINE_CUDA") == "0", reason="no nvcc, or CUDA skipped"
)
def test_extension_has_cuda_where_nvcc_is():
    assert _C.built_with_cuda
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = {int(line.removeprefix("compute_")) for line in known.stdout.split()}
    assert _C.cuda_architectures
    if "CMAKE_CUDA_ARCHITECTURES" not in os.environ and "CMAKE_ARGS" not in os.environ:
        assert set(_C.cuda_architectures) == {80, 86, 89, 90, 100, 120} & known


@pytest.mark.gpu
def test_extension_has_this_gpu():
    major, minor = torch.cuda.get_device_capability()
    # Machine code runs on any device of its major version that is not older.
    assert any(a // 10 == major and a % 10 <= minor for a in _C.cuda_architectures)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"GRPO_ENGINE_CUDA": "1"}, "GRPO_ENGINE_CUDA=1 demands CUDA, but nvcc was not found"),
        ({"GRPO_ENGINE_CUDA": "yes"}, "GRPO_ENGINE_CUDA must be 0 .* or 1 .*, got 'yes'"),
    ],
)
def test_build_says_what_is_wrong(environment, message, tmp_path):
    build_ext = ["build_ext", "--build-temp", tmp_path / "build", "--build-lib", tmp_path / "lib"]
    done = run(
        [sys.executable, ROOT / "setup.py", *build_ext],
        cwd=ROOT,
        CUDACXX=str(tmp_path / "no" / "nvcc"),
        **environment,
    )
    assert done.returncode != 0
    said = " ".join((done.stdout + done.stderr).split())
    assert re.search(message, said), said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_pip_install(kind, wheel, sdist, tmp_path):
    """Through pip into a fresh environment that borrows the installed dependencies; nothing is
    downloaded."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    # Python 3.10 and 3.11 put an old setuptools in; the borrowed one can read our pyproject.toml.
    succeed([python, "-m", "pip", "uninstall", "--yes", "setuptools"], tmp_path)
    site = succeed(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path
    )
    # A .pth inside the borrowed folder is not read, so its editable grpo-engine stays out.
    Path(site.strip(), "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    place = Path(site.strip())
    source = [wheel]
    if kind == "editable":
        with tarfile.open(sdist) as archive:
            archive.extractall(tmp_path, filter="data")
        place = next(tmp_path.glob("grpo_engine-*"))
        source = ["-e", place]
    pip = [python, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation"]
    succeed([*pip, "--ignore-installed", *source], tmp_path)
    succeed([python, "-c", textwrap.dedent(IMPORTS), place], tmp_path)
    usage = succeed([tmp_path / "venv" / "bin" / "grpo-engine", "--help"], tmp_path)
    assert "grpo" in usage
