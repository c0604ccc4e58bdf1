"""Where bases and data lie: by content hash under ANTHER_HOME, never by a path relative to the code.

`manifest.json` beside this module names what Anther ships (`anther assets --pin` writes it). An
asset is copied once from the installed package to ANTHER_HOME/assets/<hash>, so that a Flower App Bundle,
which carries no weights, finds it too.
"""

from __future__ import annotations

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

from common.errors import REPORTED_ERRORS, AntherError, refused, told
from models.base import hub

IDENTITY = {".safetensors", ".json", ".txt", ".model", ".parquet"}  # what counts; cards and pictures don't
MANIFEST = Path(__file__).with_name("manifest.json")
REPORT = "metrics.json"  # nor does what was measured


def home() -> Path:
    """ANTHER_HOME, by default ~/.anther."""
    try:
        return Path(os.environ.get("ANTHER_HOME") or "~/.anther").expanduser()
    except RuntimeError:  # a user without a name, and no HOME
        raise AntherError("this user has no home folder: set ANTHER_HOME to a folder for what Anther keeps") from None


def digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, over the names and hashes of the files that make it what it is."""
    if path.is_file():
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    return combined_digest((file.relative_to(path).as_posix(), digest(file)) for file in identity_files(path))


def identity_files(folder: Path) -> list[Path]:
    """The files that make a folder what it is."""
    return [file for file in folder.rglob("*") if is_identity_file(file) and file.is_file()]


def is_identity_file(file: Path) -> bool:
    """Whether a file of this name makes a folder what it is; those that macOS leaves beside each don't."""
    return file.suffix in IDENTITY and file.name != REPORT and not file.name.startswith("._")


def combined_digest(files: Iterable[tuple[str, str]]) -> str:
    """The content hash of a folder with files of these names, with '/' between their parts, and hashes."""
    lines = [f"{name}\0{sha256}\n" for name, sha256 in sorted(files, key=lambda file: file[0].split("/"))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_hash(name: str) -> bool:
    """Whether it is a content hash in full."""
    return re.fullmatch(r"[0-9a-f]{64}", name) is not None


def find_stored(wanted: str) -> Path | None:
    """The asset of this content hash in ANTHER_HOME; None if there is none.

    It came there whole and checked, and is not read through again: whoever loads a base hashes it anyway.
    """
    found = sorted((home() / "assets" / wanted).glob("[!.]*"))
    return found[0] if len(found) == 1 and found[0].exists() else None


def matches_hash(name: str, sha256: str) -> bool:
    """Whether a base of that name, shipped or a folder's, has this content hash."""
    manifest = _manifest()
    return (manifest[name]["sha256"] if name in manifest else digest(locate(name))) == sha256


def locate(name: str) -> Path:
    """The file or folder of a shipped asset by its name, of any that is here by its hash, of one's own by its path,
    or of the hub's by 'owner/name'."""
    manifest = _manifest()
    if is_hash(name):
        name = next((shipped for shipped, entry in manifest.items() if entry["sha256"] == name), name)
    if is_hash(name):
        if (there := find_stored(name)) is None:
            raise AntherError(
                f"{name[:12]}: no base of this hash in {home() / 'assets'}: anther device run fetches its "
                "federation's; or name a folder"
            )
        return there
    if name not in manifest:
        path = Path(name).expanduser()
        if not path.exists() and hub.is_repo_id(name):
            return hub.fetch(name)
        if not path.exists():
            raise AntherError(f"{name}: no such folder, nor a shipped asset ({', '.join(sorted(manifest))})")
        return path
    wanted = manifest[name]["sha256"]
    stored = home() / "assets" / wanted / Path(manifest[name]["path"]).name
    if not stored.exists():
        _seed(name, manifest[name]["path"], wanted, stored)
    return stored


def _seed(name: str, path: str, wanted: str, stored: Path) -> None:
    """Copy an asset from the installed package; appears under its final name only when complete."""
    for source in _installed(path):
        if source.exists() and digest(source) == wanted:
            break
    else:
        raise AntherError(f"asset {name} ({wanted[:12]}) is not in {home()}: install anther and run `anther assets`")
    try:
        _copy(source, stored)
    except OSError as error:
        raise AntherError(f"{refused(error, stored)}; ANTHER_HOME names another folder") from error


def _copy(source: Path, stored: Path) -> None:
    stored.parent.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=stored.parent.parent) as scratch:
        filling = Path(scratch) / "asset"
        filling.mkdir()
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, filling / stored.name)
        if not stored.exists():  # another process may have been faster
            shutil.rmtree(stored.parent, ignore_errors=True)
            filling.rename(stored.parent)


def _installed(path: str) -> Iterator[Path]:
    """Where the package's files may lie: beside the room that is on the path, or in the distribution."""
    room, _, rest = path.partition("/")
    spec = importlib.util.find_spec(room)  # finds a room without importing it
    for location in (spec.submodule_search_locations if spec else None) or []:
        yield Path(location) / rest
    try:
        yield Path(str(importlib.metadata.distribution("anther").locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        return


def pin(root: Path) -> None:
    """Write the hashes of a checkout's own assets into the manifest, after one of them was made anew."""
    for entry in (manifest := _manifest()).values():
        entry["sha256"] = digest(root / entry["path"])
    MANIFEST.write_text(json.dumps(manifest, indent=2) + "\n")


def _manifest() -> dict[str, dict[str, str]]:
    return json.loads(MANIFEST.read_text())


def main() -> int:
    """Have every shipped asset in ANTHER_HOME, and say where."""
    try:
        if sys.argv[1:] == ["--pin"]:
            pin(MANIFEST.parents[1])
        for asset in _manifest():
            print(f"{asset}: {locate(asset)}")
    except REPORTED_ERRORS as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
