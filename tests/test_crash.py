"""A run that is killed again and again ends as one that never was. Its longer form is tools/crash.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def test_five_kills_at_random_moments_leave_the_patch_of_an_unbroken_run(tmp_path: Path) -> None:
    tool = Path(__file__).resolve().parent.parent / "tools" / "crash.py"
    spec = importlib.util.spec_from_file_location("crash", tool)
    assert spec is not None and spec.loader is not None
    crash = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(crash)
    runs, equal = crash.trial(5, 20, 5, tmp_path)
    assert runs and equal
