"""Download and unpack Debian packages of fonts with Debian's own tools."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path


def unpack(names: Iterable[str], cache: Path) -> dict[str, str]:
    """Unpack packages to `cache/<name>`, downloading those that aren't cached, and return their versions."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is missing: rebuild the data set on Debian or Ubuntu")
    return {name: unpack_one(name, cache) for name in sorted(set(names))}


def unpack_one(name: str, cache: Path) -> str:
    archives = cache / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    if not any(archives.glob(f"{name}_*.deb")):
        subprocess.run(["apt-get", "download", "-q", name], cwd=archives, check=True)
    archive = next(archives.glob(f"{name}_*.deb"))
    if not (cache / name).is_dir():
        subprocess.run(["dpkg-deb", "-x", archive, cache / name], check=True)
    return subprocess.run(
        ["dpkg-deb", "-f", archive, "Version"], check=True, capture_output=True, text=True
    ).stdout.strip()
