"""Draw with what this device has learnt:  anther device draw "my cat on a sofa" "my cat asleep" [--steps 4]

The shared adapter and the personal one on top of it are added to the base as it is held, in few bits too, and nothing
leaves the device. One PNG is written for each caption.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from client.cli.paths import owner_parser, run
from client.store.open import inspect_store
from common.errors import AntherError
from models.diffusion.decoding import TILE
from models.diffusion.sampling import SAMPLERS
from models.quantization.modes import WEIGHT_MODES
from privacy.storage import FileStorage

if TYPE_CHECKING:
    from client.store.store import Store
    from models.base.base import Base
    from models.lora.adapter import Adapter

UNDER = ("personal", "shared", "base")


def main(arguments: Sequence[str] | None = None) -> int:
    """The process' exit status: 2, with one line on standard error, if it can't be drawn."""
    parser = owner_parser("client.cli.draw", __doc__ or "")
    parser.add_argument("captions", nargs="+", help="what to draw")
    parser.add_argument("--base", default="glyphs", help="name of a shipped base, or folder of a pipeline or its pack")
    parser.add_argument("--weights", default="fp32", choices=tuple(WEIGHT_MODES), help="how it is held")
    parser.add_argument("--under", default="personal", choices=UNDER, help="shared: without what is yours alone")
    parser.add_argument("--sampler", default="dpm", choices=SAMPLERS)
    parser.add_argument("--steps", type=int, default=8, help="1 to 4 with lcm or ancestral, if distilled for it")
    parser.add_argument("--guidance", type=float, default=1.5, help="1: none, as a base distilled to few steps needs")
    parser.add_argument("--resolution", type=int, help="side in pixels (default: the base's own)")
    parser.add_argument("--small-vae", type=Path, metavar="DIR", help="an AutoencoderTiny that decodes")
    parser.add_argument("--tile", type=int, default=TILE, help="side of the pieces to decode in pixels; 0: whole")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("drawn"), metavar="DIR", help="folder of the pictures")
    return run(parser, arguments, draw)


def draw(files: FileStorage, asked: argparse.Namespace) -> str:
    """Draw every caption; where the pictures are.

    Raises:
        AntherError: there is nothing personal, it belongs to another base, or what was asked for can't be.
    """
    from PIL import Image

    from models.base.base import load
    from training.inference import generate_with
    from training.memory import budget, inference_share

    _check(asked)
    store = inspect_store(files).store
    sites = store.personal_sites()
    base = load(
        asked.base,
        sites="|".join(map(re.escape, sites)) or None,
        weights=asked.weights,
        device="auto",
        resolution=asked.resolution,
    )
    latents = generate_with(
        base,
        asked.captions,
        _adapters(store, base, asked.under),
        seed=asked.seed,
        sampler=asked.sampler,
        steps=asked.steps,
        guidance=asked.guidance,
        memory=inference_share(budget(None, base.device)),
    )
    pictures = base.decode(latents, small=asked.small_vae, tile=asked.tile or None)
    asked.out.mkdir(parents=True, exist_ok=True)
    written = []
    for number, (caption, picture) in enumerate(zip(asked.captions, pictures, strict=True), start=1):
        under = "" if asked.under == "personal" else f"-{asked.under}"  # so that they can lie side by side
        written.append(asked.out / f"{number:02}{under}-{_slug(caption)}.png")
        Image.fromarray(picture).save(written[-1])
    return "\n".join(map(str, written))


def _check(asked: argparse.Namespace) -> None:
    """What would fail only after the base was loaded."""
    for name, valid, rule in (
        ("steps", 1 <= asked.steps <= 1000, "1 to 1000"),
        ("guidance", 1 <= asked.guidance <= 1000, "1 to 1000"),
        ("resolution", asked.resolution is None or 8 <= asked.resolution <= 8192, "8 to 8192"),
        ("tile", 0 <= asked.tile <= 8192, "0 to 8192"),
        ("seed", 0 <= asked.seed < 2**63, "0 to 2⁶³ − 1"),
        ("out", not (asked.out.is_file() or asked.out.suffix.lower() in (".png", ".jpg", ".jpeg")), "a folder"),
    ):
        if not valid:
            raise AntherError(f"--{name} {getattr(asked, name)}: must be {rule}")
    if wrong := next((caption for caption in asked.captions if not caption.strip()), None):
        raise AntherError(f"{wrong!r}: says nothing to draw")


def _adapters(store: Store, base: Base, under: str) -> list[Adapter]:
    """What is added to the base."""
    if under == "base":
        return []
    found = store.personal(base.sites)
    if found is None:
        raise AntherError(f"{store.where}: nothing was learnt here yet: draw with --under base, or take part in a run")
    if found.base != base.hash:
        raise AntherError(
            f"{store.where}: what was learnt here belongs to another base ({found.base[:12]}), this one is "
            f"{base.hash[:12]}: name that with --base"
        )
    return [found.shared, found.adapter] if under == "personal" else [found.shared]


def _slug(caption: str) -> str:
    """A caption as a file's name."""
    return re.sub(r"\W+", "-", caption.lower()).strip("-")[:40] or "picture"


if __name__ == "__main__":
    sys.exit(main())
