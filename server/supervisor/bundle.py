"""The app bundle that a SuperLink runs: the rooms as they are installed here, in a folder of their own.

Devices run what they have installed themselves; of the bundle only the ServerApp is ever run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from pathlib import Path

from common.errors import AntherError

PACKAGES = ("client", "common", "conf", "models", "privacy", "protocol", "server", "strategies", "training")
_KEPT = {".py", ".yaml", ".json", ".toml"}

PROJECT = """[project]
name = "anther"
version = "{version}"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "anther"
fab-include = ["**/*.py", "**/*.yaml", "models/base/manifest.json"]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
overrides = ""
min_devices = 1
patience = 48.0
"""


def assemble(folder: Path) -> Path:
    """Put the bundle's files into `folder`, in place of what is there."""
    shutil.rmtree(folder, ignore_errors=True)
    for room in PACKAGES:
        source = _room(room)
        for file in source.rglob("*"):
            if file.suffix in _KEPT and file.is_file() and "__pycache__" not in file.parts:
                target = folder / room / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
    (folder / "pyproject.toml").write_text(PROJECT.format(version=version()), encoding="utf-8")
    return folder


def version() -> str:
    try:
        return importlib.metadata.version("anther")
    except importlib.metadata.PackageNotFoundError:
        return "0.0.0"


def _room(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # finds a room without importing it
    if spec is None or not spec.submodule_search_locations:
        raise AntherError(f"{name}: not installed beside the others; install Anther again")
    return Path(next(iter(spec.submodule_search_locations)))
