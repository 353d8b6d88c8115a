"""What a bug report needs: versions, devices, memory, extras."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .memory import host_bytes

NEEDED = [
    "torch",
    "transformers",
    "bitsandbytes",
    "peft",
    "math-verify",
    "click",
    "safetensors",
    "numpy",
    "rich",
    "zstandard",
]
EXTRAS = {
    "llama": ["llama-cpp-python"],
    "hub": ["datasets"],
    "gym": ["reasoning-gym"],
    "plots": ["matplotlib"],
    "test": ["pytest", "hypothesis"],
}


def examine() -> dict[str, Any]:
    """Everything as one JSON object. An absent package is null."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "total_bytes": total,
                "free_bytes": free,
            }
        )
    return {
        "frugal_rl": _version("frugal-rl"),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "host_memory_bytes": host_bytes(),
        "cuda": torch.version.cuda,
        "devices": devices,
        # torch says its build as well
        "packages": {name: _version(name) for name in NEEDED} | {"torch": torch.__version__},
        "extras": {extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
