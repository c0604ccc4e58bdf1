"""Locate bases and data by content hash under ANTHER_HOME, never by a path relative to the code.

`manifest.json` beside this module lists the shipped assets (`anther assets --pin` writes it). An asset is copied once
from the installed package to ANTHER_HOME/assets/<hash>, so that a Flower App Bundle, which contains no weights, can use
it too.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.errors import REPORTED_ERRORS, AntherError, describe_error, os_error
from common.terminal import discard_output
from models.files import hub

IDENTITY = {".safetensors", ".json", ".txt", ".model", ".parquet"}  # suffixes of hashed files; cards and images aren't
MANIFEST = Path(__file__).with_name("manifest.json")
REPORT = "metrics.json"  # measurements aren't hashed either


def home() -> Path:
    """Return ANTHER_HOME (default: ~/.anther)."""
    try:
        return Path(os.environ.get("ANTHER_HOME") or "~/.anther").expanduser()
    except RuntimeError:  # a user without a name, and no HOME
        raise AntherError("this user has no home folder: set ANTHER_HOME to a folder for Anther's files") from None


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and hashes of a folder's identity files."""
    if path.is_file():
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    return combined_digest((file.relative_to(path).as_posix(), digest(file)) for file in identity_files(path))


def identity_files(folder: Path) -> list[Path]:
    """Return the files that determine the content hash of a folder."""
    return [file for file in folder.rglob("*") if is_identity_file(file) and file.is_file()]


def is_identity_file(file: Path) -> bool:
    """Return whether a file of this name is part of a folder's content hash. The `._` files of macOS aren't."""
    return file.suffix in IDENTITY and file.name != REPORT and not file.name.startswith("._")


def combined_digest(files: Iterable[tuple[str, str]]) -> str:
    """Return the content hash of a folder from pairs of (name with `/` separators, SHA-256)."""
    lines = [f"{name}\0{sha256}\n" for name, sha256 in sorted(files, key=lambda file: file[0].split("/"))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_hash(name: str) -> bool:
    """Return whether `name` is a complete content hash."""
    return re.fullmatch(r"[0-9a-f]{64}", name) is not None


def find_stored(sha256: str) -> Path | None:
    """Return the asset with this content hash in ANTHER_HOME, or None.

    It was verified when it was stored and is not hashed again here: loading a base hashes it anyway.
    """
    assets = sorted((home() / "assets" / sha256).glob("[!.]*"))
    return assets[0] if len(assets) == 1 and assets[0].exists() else None


def matches_hash(name: str, sha256: str) -> bool:
    """Return whether the base of this name (shipped asset or folder) has this content hash."""
    manifest = _manifest()
    return (manifest[name]["sha256"] if name in manifest else digest(locate(name))) == sha256


def locate(name: str) -> Path:
    """Return the file or folder of an asset.

    Args:
        name: name of a shipped asset, content hash of a stored one, path of a folder, or 'owner/name' on the hub.

    Raises:
        AntherError: nothing matches, or the asset can't be copied or downloaded.
    """
    manifest = _manifest()
    if is_hash(name):
        name = next((shipped for shipped, entry in manifest.items() if entry["sha256"] == name), name)
    if is_hash(name):
        if (stored := find_stored(name)) is None:
            raise AntherError(
                f"{name[:12]}: no base of this hash in {home() / 'assets'}: anther device run fetches its "
                "federation's; or name a folder"
            )
        return stored
    if name not in manifest:
        path = Path(name).expanduser()
        if not path.exists() and hub.is_repo_id(name):
            return hub.fetch(name)
        if not path.exists():
            raise AntherError(f"{name}: no such folder, nor a shipped asset ({', '.join(sorted(manifest))})")
        return path
    sha256 = manifest[name]["sha256"]
    stored = home() / "assets" / sha256 / Path(manifest[name]["path"]).name
    if not stored.exists():
        _seed(name, manifest[name]["path"], sha256, stored)
    return stored


def _seed(name: str, path: str, sha256: str, stored: Path) -> None:
    """Copy an asset from the installed package, atomically."""
    for source in _installed(path):
        if source.exists() and digest(source) == sha256:
            break
    else:
        raise AntherError(f"asset {name} ({sha256[:12]}) is not in {home()}: install anther and run `anther assets`")
    try:
        _copy(source, stored)
    except OSError as error:
        raise AntherError(f"{os_error(error, stored)}; set ANTHER_HOME to another folder") from error


def _copy(source: Path, stored: Path) -> None:
    stored.parent.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=stored.parent.parent) as scratch:
        partial = Path(scratch) / "asset"
        partial.mkdir()
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, partial / stored.name)
        if not stored.exists():  # another process may have been faster
            shutil.rmtree(stored.parent, ignore_errors=True)
            partial.rename(stored.parent)


def _installed(path: str) -> Iterator[Path]:
    """Yield possible locations of a package file: beside the top-level package on the path, or in the distribution."""
    package, _, relative = path.partition("/")
    spec = importlib.util.find_spec(package)  # finds the package without importing it
    for location in (spec.submodule_search_locations if spec else None) or []:
        yield Path(location) / relative
    try:
        yield Path(str(importlib.metadata.distribution("anther").locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        return


def pin(root: Path) -> None:
    """Write the hashes of a checkout's own assets into the manifest, after one of them was rebuilt."""
    for entry in (manifest := _manifest()).values():
        entry["sha256"] = digest(root / entry["path"])
    MANIFEST.write_text(json.dumps(manifest, indent=2) + "\n")


def _manifest() -> dict[str, dict[str, str]]:
    return json.loads(MANIFEST.read_text())


def main() -> int:
    """Copy every shipped asset to ANTHER_HOME and print its location."""
    parser = argparse.ArgumentParser(prog="anther assets", description=main.__doc__)
    parser.add_argument("--pin", action="store_true", help=argparse.SUPPRESS)  # after an asset was made again
    pinned = parser.parse_args().pin
    try:
        if pinned:
            pin(MANIFEST.parents[2])
        for asset in _manifest():
            print(f"{asset}: {locate(asset)}")
    except BrokenPipeError:  # the reader of our output closed it
        discard_output()
        return 2
    except REPORTED_ERRORS as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
