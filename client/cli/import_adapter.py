"""Start this device's personal adapter from a LoRA made elsewhere:  anther import FILE.safetensors [--base BASE]

FILE is in the layout of diffusers (peft) or kohya, for the same kind of base. The next training continues from it. The
current personal adapter stays stored: `anther device roll-back` restores it. Parts for text encoders are ignored.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from client import paths
from client.cli.common import allow_owned_plugins, owner_parser, run
from client.store.open import AS_IT_IS, OpenStore, open_store
from client.store.store import IMPORTED, PersonalAdapter
from common.errors import AntherError
from models.diffusion.sites import resolve_sites
from models.export.base_outline import BaseOutline, outline
from models.export.reading import ImportedAdapter, read_adapter
from models.files import assets
from models.lora.adapter import Adapter, Factors, Sites, rank
from models.lora.norm_bound import is_zero, norm_violation
from privacy.storage import FileStorage

HAS_SHARED = ("shared", "shared+personal")
"""Contents that include a shared adapter, so that none may be under them."""


class _Node(NamedTuple):
    """Settings of the enrolled device; defaults for another store."""

    base: str | None = None
    federation: str | None = None
    encrypt: str = AS_IT_IS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return exit status 2, with one line on standard error, if importing isn't possible."""
    parser = owner_parser("import", __doc__ or "", group="")
    parser.add_argument("file", type=Path, metavar="FILE.safetensors", help="LoRA in diffusers' or kohya's layout")
    parser.add_argument(
        "--base",
        help="name or folder of the base that this device uses (default: of its current adapter, as configured, or "
        "glyphs)",
    )
    parser.add_argument(
        "--any-base",
        action="store_true",
        help="accept an adapter of Anther for another base with these layers",
    )
    return run(parser, arguments, import_adapter)


def import_adapter(files: FileStorage, options: argparse.Namespace) -> str:
    """Import the adapter; return lines for the owner.

    Raises:
        AntherError: the file isn't a LoRA for this base, or the store is in use.
    """
    allow_owned_plugins()
    node, file = _node(options), options.file.expanduser()
    with open_store(files, encrypt=node.encrypt, federation=node.federation) as opened:
        store = opened.store
        version = next((version for version in store.personal_versions() if version.is_current), None)
        base = outline(options.base or (version and version.base) or node.base or "glyphs")
        read = read_adapter(file, base, any_base=options.any_base)
        if reason := norm_violation(read.adapter):
            raise AntherError(f"{file}: {reason}: scale it down where it was made")
        if is_zero(read.adapter):
            raise AntherError(f"{file}: changes nothing, its product is zero at every layer: name another file")
        current = _current(opened, base) if version is not None and version.base == base.hash else None
        imported = _personal(read, base, current, f"{IMPORTED}{assets.digest(file)}")
        store.save_personal(imported, aside=version is not None)
    under = "on top of the shared adapter" if current and not is_zero(imported.shared) else "without a shared adapter"
    replaced = (
        [f"The adapter of {version.created} stays stored: anther device roll-back restores it."] if version else []
    )
    return "\n".join(
        [
            f"{store.where}: the personal adapter is now {file.name}: {len(read.adapter)} layers of rank "
            f"{rank(read.adapter)}, {under}, on base {base.hash[:12]} ({base.family.name}).",
            *(f"{file.name}: {note}." for note in read.notes),
            *replaced,
        ]
    )


def _node(options: argparse.Namespace) -> _Node:
    """Return the settings of the device enrolled here, unless another store is named."""
    if options.store or options.name or not paths.config_file().exists():
        return _Node()
    from conf.schemas.node import compose  # slow import, so only here

    node = compose([], paths.config_file())
    return _Node(node.base, node.federation, node.storage.encrypt)


def _current(opened: OpenStore, base: BaseOutline) -> PersonalAdapter | None:
    names = set(opened.store.personal_sites())
    return opened.store.personal({name: site for name, site in base.sites.items() if name in names})


def _personal(
    read: ImportedAdapter, base: BaseOutline, current: PersonalAdapter | None, request: str
) -> PersonalAdapter:
    """Return the adapter to store, at the layers that the device trains and that the file adapts.

    Args:
        read: the file's content.
        base: the device's base.
        current: its current adapter for this base, if any; its shared adapter stays under the imported one.
        request: identifies the file.
    """
    trained = current.adapter if current else resolve_sites(base.sites, None, attention=base.family.sites)
    sites = {name: site for name, site in base.sites.items() if name in trained or name in read.adapter}
    shared = {} if current is None or read.contents in HAS_SHARED else current.shared
    return PersonalAdapter(_at(sites, read.adapter), _at(sites, shared), base.hash, request)


def _at(sites: Sites, adapter: Adapter) -> Adapter:
    """Return the adapter at exactly these sites: zero where it has none, of rank 1 if it is empty."""
    target = max(1, rank(adapter))
    return {
        name: adapter.get(name) or Factors(torch.zeros(target, site.inputs), torch.zeros(site.outputs, target))
        for name, site in sites.items()
    }


if __name__ == "__main__":
    sys.exit(main())
