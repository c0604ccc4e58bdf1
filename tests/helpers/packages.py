"""Installed packages that exist in a temporary folder only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest


def install(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *, module: str, source: str, entry_points: Mapping[str, str]
) -> None:
    """Install a distribution with one module in a folder, and put the folder on the import path.

    Args:
        monkeypatch: undoes the change of the import path.
        folder: where the files are written.
        module: name of the module, and of the distribution.
        source: text of the module.
        entry_points: `module:Class` of each `group name`.
    """
    information = folder / f"{module}-1.0.dist-info"
    information.mkdir(parents=True)
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n", encoding="utf-8")
    lines = []
    for key, value in entry_points.items():
        group, name = key.split()
        lines += [f"[{group}]", f"{name} = {value}"]
    (information / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
