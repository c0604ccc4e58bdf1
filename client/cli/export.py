"""Export a learned adapter for other tools:  anther export [FILE] OUT.safetensors [--layout kohya]

Without FILE, an adapter of this device: the shared one, or with --what personal or both also yours. With FILE, an
adapter that a run wrote, such as RUN/adapters/shared.safetensors. Layout diffusers is for `pipe.load_lora_weights`,
kohya for ComfyUI, A1111, Forge and sd-scripts. The file records base, rank, license and the privacy spent.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from client.cli.common import allow_owned_plugins, owner_parser, read_history, run
from client.store.open import check_store_exists, inspect_store
from common.errors import AntherError
from models.export import adapter_files
from models.export.base_outline import BaseOutline, outline
from models.export.layouts import LAYOUTS, export
from models.export.lora_file import read_header
from models.export.reading import read_adapter
from models.lora.adapter import Adapter, rank
from models.lora.norm_bound import is_zero
from privacy import policy
from privacy.accounting import Guarantee, with_strict
from privacy.storage import FileStorage

CONTENTS = {"shared": "shared", "personal": "personal", "both": "shared+personal"}
NOTHING_SHARED = "this device has shared nothing"
PERSONAL_NOTE = "contains an adapter that was trained on the owner's pictures, without noise: it can reveal them"


class _Source(NamedTuple):
    """An adapter to export."""

    adapter: Adapter
    base: BaseOutline
    contents: str  # key of `adapter_files.CONTENTS`
    privacy: Mapping[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return exit status 2, with one line on standard error, if exporting isn't possible."""
    parser = owner_parser("export", __doc__ or "", group="")
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="adapter of a run (default: this device's)")
    parser.add_argument("out", type=Path, metavar="OUT.safetensors", help="file to write")
    parser.add_argument(
        "--what",
        choices=tuple(CONTENTS),
        help="shared (default); personal: yours, to be loaded on top of the shared one; both: their sum in one adapter",
    )
    parser.add_argument("--layout", default="diffusers", choices=LAYOUTS, help="layout of the file")
    parser.add_argument("--base", help="name or folder of the adapter's base (default: found by its hash)")
    parser.add_argument("--trigger", metavar="WORD", help="word in captions that calls the subject, for other tools")
    return run(parser, arguments, export_adapter)


def export_adapter(files: FileStorage, options: argparse.Namespace) -> str:
    """Export the adapter; return lines for the owner.

    Raises:
        AntherError: there is no adapter, it belongs to another base, or no tool reads the layout.
    """
    out = options.out.expanduser()
    if out.suffix != ".safetensors":
        raise AntherError(f"{out}: must end with .safetensors, by which tools recognize the format")
    if out.exists():
        raise AntherError(f"{out}: already exists: choose another file")
    allow_owned_plugins()
    source = _of_run(options) if options.file else _of_device(files, options)
    base = replace(source.base, sites={name: source.base.sites[name] for name in source.adapter})
    metadata = {
        **adapter_files.describe(base, source.contents),
        **source.privacy,
        "anther_layout": options.layout,
        "anther_rank": str(rank(source.adapter)),
        "anther_alpha": str(rank(source.adapter)),  # α/r is folded into B
    }
    if "personal" in source.contents:
        metadata["anther_personal"] = PERSONAL_NOTE
    if options.trigger:
        metadata |= {"modelspec.trigger_phrase": options.trigger, "anther_trigger": options.trigger}
    export(source.adapter, out, family=base.family, sites=base.sites, layout=options.layout, metadata=metadata)
    lines = [
        f"{out}: {source.contents} adapter of rank {rank(source.adapter)} in layout {options.layout}, for base "
        f"{base.hash[:12]} ({base.family.name})"
    ]
    if "personal" in source.contents:
        lines.append(f"It {PERSONAL_NOTE}.")
    if is_zero(source.adapter):
        lines.append("It changes nothing: its product is zero at every layer.")
    if options.layout == "kohya" and (ignored := metadata.get("anther_ignored_by_sd_scripts")):
        lines.append(f"sd-scripts ignores {len(ignored.split())} of its layers, ComfyUI reads them: {ignored}")
    return "\n".join(lines)


def _of_run(options: argparse.Namespace) -> _Source:
    """Read an adapter that a run or an earlier export wrote."""
    file = options.file.expanduser()
    metadata = read_header(file)
    contents = metadata.get("anther_contents")
    if contents not in adapter_files.CONTENTS:
        raise AntherError(f"{file}: was not written by Anther: only its adapters can be exported again")
    if options.what and CONTENTS[options.what] != contents:
        raise AntherError(f"--what {options.what}: {file} holds {contents}: name another of the run's files")
    base = _base(options.base or metadata.get("anther_base", ""))
    privacy = {key: value for key, value in metadata.items() if key in _PRIVACY_KEYS} or _privacy_of_run(file)
    return _Source(read_adapter(file, base).adapter, base, contents, privacy)


def _of_device(files: FileStorage, options: argparse.Namespace) -> _Source:
    """Read the adapters of a device's store."""
    check_store_exists(files)
    store = inspect_store(files).store
    current = next((version for version in store.personal_versions() if version.is_current), None)
    if current is None:
        raise AntherError(f"{store.where}: nothing was learned here yet: take part in a federation, or anther import")
    base = _base(options.base or current.base)
    if current.base != base.hash:
        raise AntherError(
            f"{store.where}: the learned adapter belongs to another base ({current.base[:12]}), this one is "
            f"{base.hash[:12]}: name that with --base"
        )
    sites = {name: base.sites[name] for name in store.personal_sites() if name in base.sites}
    stored = store.personal({name: site for name, site in base.sites.items() if name in sites})
    assert stored is not None, "there is a current version"
    contents = CONTENTS[options.what or "shared"]
    adapters = {
        "shared": stored.effective_shared,
        "personal": stored.adapter,
        "shared+personal": stored.combined,
    }
    if contents == "shared" and is_zero(adapters["shared"]):
        raise AntherError(f"{store.where}: there is no shared adapter: export yours with --what personal")
    return _Source(adapters[contents], base, contents, _privacy_of_device(files))


def _base(name: str) -> BaseOutline:
    """Return the outline of a base; AntherError with a hint if only its hash is known."""
    if not name:
        raise AntherError("the adapter doesn't record its base: name it with --base")
    try:
        return outline(name)
    except AntherError as error:
        if len(name) == 64:
            raise AntherError(f"{error}, with --base") from error
        raise


_PRIVACY_KEYS = ("anther_privacy", "anther_epsilon", "anther_delta", "anther_privacy_unit")


def _privacy_of_device(files: FileStorage) -> dict[str, str]:
    """Return the metadata about everything that the device has shared, from its ledger."""
    history = read_history(files)
    if not history.entries:
        return {"anther_privacy": NOTHING_SHARED}
    delta = policy.load(files.folder / "policy.toml").delta
    return _as_metadata(with_strict(history.spent(delta), history.mechanisms))


def _privacy_of_run(file: Path) -> dict[str, str]:
    """Return the metadata about the largest ε of a run's devices, from the summary beside its adapters."""
    summaries = (folder / "summary.json" for folder in file.absolute().parents[:3])
    summary = next((path for path in summaries if path.is_file()), None)
    try:
        content = {} if summary is None else json.loads(summary.read_text(encoding="utf-8"))
        stated = [content[key] for key in ("epsilon", "device_epsilon") if content.get(key)]
        guarantees = [Guarantee(**{**entry, "value": entry.get("value") or math.inf}) for entry in stated]
    except (ValueError, TypeError) as error:
        raise AntherError(f"{summary}: can't be read ({error}): repair it, or move the adapter elsewhere") from error
    if not guarantees:
        return {"anther_privacy": "shared without noise: no privacy guarantee"} if content else {}
    return _as_metadata(*guarantees)


def _as_metadata(first: Guarantee, *others: Guarantee) -> dict[str, str]:
    if math.isinf(first.value):
        text = "shared without noise: no privacy guarantee"
    else:
        text = "; ".join(map(str, (first, *others)))
    return {
        "anther_privacy": text,
        "anther_epsilon": f"{first.value:.6g}",
        "anther_delta": f"{first.delta:g}",
        "anther_privacy_unit": first.unit,
    }


if __name__ == "__main__":
    sys.exit(main())
