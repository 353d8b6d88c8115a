"""Runs reward functions in a worker: a user's `path.py:function`, an entry point's, or a built-in one.

A function gets the problem, a dict of all fields of its row (with "prompt" and "answer"), and the text
of the response. It returns a float (1 and more counts as CORRECT, less as WRONG), a bool, or a Verdict.
What it raises is an ERROR, never a 0; what it prints is lost. It may be killed at any moment.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from frugal_rl.rewards.answers import Verdict


def call(payload: dict[str, Any]) -> dict[str, Any]:
    """Without a problem: only import the function, so that workers are forked with it."""
    function = load(payload["function"])
    if "problem" not in payload:
        return {}
    result = function(payload["problem"], payload["response"], *payload["arguments"])
    detail = ""
    if isinstance(result, tuple):  # the built-in ones say why
        result, detail = result
    if isinstance(result, Verdict):
        return {"verdict": result.name, "reward": None, "detail": detail}
    if hasattr(result, "item"):  # a numpy or torch number
        result = result.item()
    if not isinstance(result, bool | int | float):
        raise TypeError(f"it returned {type(result).__name__}, expected a number, a bool or a Verdict")
    if not math.isfinite(result):
        raise ValueError(f"it returned {result}")
    name = "CORRECT" if result >= 1 else "WRONG"
    return {"verdict": name, "reward": float(result), "detail": detail}


@functools.cache
def load(target: str) -> Callable[..., Any]:
    """The function called "path.py:name" or "module:name". Its folder can be imported from."""
    where, _, name = target.rpartition(":")
    if where.endswith(".py"):
        path = Path(where)
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(where)
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise LookupError(f"{where} has no function {name!r} (it has {', '.join(there) or 'none'})")
    return function
