"""Imports point down, and the light modules stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import frugal_rl

PACKAGE = Path(frugal_rl.__file__).parent

# Each module may import from the lines above its own, and from its own line only what stands before it.
LEVELS = [
    ["errors"],
    ["values", "sources"],
    [
        "spectrum",
        "report.plots",
        "report.page",
        "rewards.kinds",
        "rewards.sandbox",
        "generators",
        "container",
        "codes",
        "patch",
        "arms",
        "config",
        "rollout",
        "gym",
        "tasks",
        "console",
    ],
    [
        "undo",
        "checkpoint",
        "rewards.workers",
        "rewards.quantities",
        "rewards.spoken",
        "rewards.answers",
        "rewards.structure",
        "rewards.judges",
        "rewards.algebra",
        "rewards.custom",
        "rewards.verifiers",
        "rewards.gym",
    ],
    ["live", "problems", "reward", "loss", "correct", "memory", "models", "shapes", "analysis"],
    ["report.update"],
    [
        "kernels.choice",
        "kernels.dequantise",
        "kernels.propose",
        "kernels.matmul",
        "kernels.attention",
        "kernels.fused",
    ],
    [
        "doctor",
        "stream",
        "storage",
        "weights",
        "gguf.formats",
        "gguf.file",
        "gguf.layout",
        "gguf.vocab",
        "gguf.write",
        "gguf.change",
    ],
    ["transit", "decoder"],
    [
        "policy",
        "learn",
        "generate.transfer",
        "generate.cache",
        "generate.eviction",
        "generate.sample",
        "generate.graphs",
        "generate.layers",
        "generate.engine",
        "generate.llama_library",
        "generate.llamacpp",
        "shortage",
    ],
    ["baselines", "lora"],
    ["peaks", "sampled", "update", "evaluate", "journal", "curation", "sinks"],
    ["report.run", "session"],
    ["export", "train"],
    ["paired", "compare", "compare_table", "report.comparison"],
    ["cli_export", "cli_patch", "cli_analyse", "cli_reward", "cli_compare", "cli"],
]
RANK = {name: (level, place) for level, names in enumerate(LEVELS) for place, name in enumerate(names)}
# may be imported, and the command line started, without torch
LIGHT = [
    "cli",
    "config",
    "patch",
    "checkpoint",
    "problems",
    "sources",
    "values",
    "gym",
    "reward",
    "rollout",
    "tasks",
    "models",
    "memory",
    "shapes",
    "journal",
    "gguf.change",
    "analysis",
    "report.update",
]


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if name not in ("__init__", "__main__") and not name.endswith(".__init__"):
            found[name] = path
    return found


def imports_of(path: Path, name: str) -> set[str]:
    """Modules of this package that a file imports, anywhere in it."""
    found = set()
    package = ["frugal_rl", *name.split(".")[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else []
            target = [*prefix, *(node.module.split(".") if node.module else [])]
            if target[:1] != ["frugal_rl"]:
                continue
            inner = ".".join(target[1:])
            found |= {inner} if inner in RANK else {f"{inner}.{a.name}".strip(".") for a in node.names}
        elif isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
            found |= {".".join(n[1:]) for n in names if n[0] == "frugal_rl" and len(n) > 1}
    return found


def violations(name: str, path: Path) -> list[str]:
    return [f"{name} imports {other}" for other in imports_of(path, name) if RANK[other] >= RANK[name]]


def test_every_module_has_its_place() -> None:
    assert set(modules()) == set(RANK)


@pytest.mark.parametrize("name", sorted(RANK))
def test_imports_point_downwards(name: str) -> None:
    assert violations(name, modules()[name]) == []


def test_the_learner_never_imports_a_generator() -> None:
    assert not [m for m in imports_of(modules()["learn"], "learn") if m.startswith("generate")]


def test_an_upward_import_is_seen(tmp_path: Path) -> None:
    bad = tmp_path / "loss.py"
    for line in ("from .train import train", "from . import cli", "import frugal_rl.train"):
        bad.write_text(f"def f():\n    {line}\n")
        assert violations("loss", bad), line


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_load_no_torch(name: str) -> None:
    code = f"import sys, frugal_rl.{name}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_the_package_loads_neither_torch_nor_numpy() -> None:
    code = "import sys, frugal_rl; sys.exit(bool({'torch', 'numpy', 'click'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_answers_in_under_half_a_second_of_cpu_time() -> None:
    code = (
        "import resource, subprocess, sys;"
        "subprocess.run([sys.executable, '-m', 'frugal_rl', '-h'], check=True, stdout=subprocess.DEVNULL);"
        "u = resource.getrusage(resource.RUSAGE_CHILDREN); print(u.ru_utime + u.ru_stime)"
    )
    out = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
        for _ in range(3)
    ]
    assert min(out) < 0.5


@pytest.mark.parametrize("name", frugal_rl.__all__)
def test_every_public_name_resolves_and_is_documented(name: str) -> None:
    assert getattr(frugal_rl, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such"):
        frugal_rl.no_such  # noqa: B018
