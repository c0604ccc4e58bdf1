"""Machine and package versions that a result file records."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def machine(device: torch.device) -> dict[str, object]:
    """Return the properties of the machine that measurements depend on."""
    properties = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return {**properties, "python": platform.python_version()}


def processor() -> str:
    """Return the processor's name, which platform.processor() often lacks on Linux."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str | None]:
    """Return the version of each package; None if it is not installed."""
    installed: dict[str, str | None] = {}
    for package in packages:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = None
    return installed


def memory(key: str) -> int:
    """Return a value of this process's status file in bytes: VmRSS, VmHWM, RssAnon or RssFile."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
