"""App bundle of a run: copies of the installed packages in a folder, for the SuperLink.

Devices run their own installed packages; only the ServerApp runs from the bundle.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from pathlib import Path

from common.errors import AntherError

PACKAGES = ("client", "common", "conf", "models", "privacy", "protocol", "server", "strategies", "training")
_SUFFIXES = {".py", ".yaml", ".json", ".toml"}

PROJECT = """[project]
name = "anther"
version = "{version}"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "anther"
fab-include = ["**/*.py", "**/*.yaml", "models/files/manifest.json"]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
overrides = ""
min_devices = 1
patience = 48.0
"""


def assemble(folder: Path) -> Path:
    """Write the bundle into `folder`, replacing its contents."""
    shutil.rmtree(folder, ignore_errors=True)
    for package in PACKAGES:
        source = _package_folder(package)
        for file in source.rglob("*"):
            if file.suffix in _SUFFIXES and file.is_file() and "__pycache__" not in file.parts:
                target = folder / package / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
    (folder / "pyproject.toml").write_text(PROJECT.format(version=version()), encoding="utf-8")
    return folder


def version() -> str:
    """Return the installed version of Anther."""
    try:
        return importlib.metadata.version("anther")
    except importlib.metadata.PackageNotFoundError:
        return "0.0.0"


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # finds a package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise AntherError(f"{name}: not installed with the other packages; install Anther again")
    return Path(next(iter(spec.submodule_search_locations)))
