"""The scripts in tools/."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parents[1] / "tools"
SCRIPTS = sorted(TOOLS.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_script_takes_from_another_one_or_from_the_package_is_there(script: Path) -> None:
    """Read, not run: a script may want a GPU, or a package that only it needs."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        source = TOOLS / f"{node.module}.py"
        if node.module.startswith("frugal_rl"):
            found = importlib.util.find_spec(node.module)
            assert found is not None and found.origin is not None, node.module
            source = Path(found.origin)
        elif not source.exists():
            assert not node.module.startswith(("bench_", "build_", "study_", "compile_")), node.module
            continue
        names = {alias.name for alias in node.names} - _top_level(source)
        if source.name == "__init__.py":
            names = {name for name in names if importlib.util.find_spec(f"{node.module}.{name}") is None}
        assert not names, f"{source.name} has no {sorted(names)}"


def test_steps_of_continuous_batching_are_those_in_which_all_requests_decode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While prompts are still run, and when the first requests have ended, a step is another one."""
    monkeypatch.syspath_prepend(str(TOOLS))
    from bench_decode import steps_together

    early = [0.0, 5.0, 10.0, 11.0, 12.5, 14.0]
    late = [10.0, 11.0, 12.5, 14.0, 14.5, 15.0]
    assert steps_together([early, late]) == [1.0, 1.5, 1.5]
    with pytest.raises(RuntimeError, match="had ended"):
        steps_together([[0.0, 1.0], [2.0, 3.0]])


def test_a_machine_without_git_is_told_the_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    from bench_learn import commit

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FRUGAL_RL_COMMIT", "c0ffee1")
    assert commit() == "c0ffee1"


def _top_level(source: Path) -> set[str]:
    """Names that a file defines, assigns or imports outside of functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def test_memory_is_capped_on_a_gpu_that_is_named_without_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.set_per_process_memory_fraction refuses torch.device("cuda"), which has no index."""
    monkeypatch.syspath_prepend(str(TOOLS))
    from bench_learn import capped

    asked: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *a: asked.append(a), raising=False)
    card = type("Card", (), {"total_memory": 96 << 30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    for name in ("cuda", "cuda:0", "cuda:1", "cpu"):
        capped(torch.device(name), 24 << 30)
    assert asked == [(0.25, 0), (0.25, 0), (0.25, 1)]
    others = [s.name for s in SCRIPTS if "set_per_process_memory_fraction" in s.read_text(encoding="utf-8")]
    assert others == ["bench_learn.py"]  # each script caps its memory by this function
