"""Draw with what this device has learned:  anther device draw "my cat on a sofa" "my cat asleep" [--steps 4]

The shared adapter, and the personal adapter on top of it, are added to the base, also if the base is quantized. Nothing
leaves the device. Writes one PNG for each caption.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from client.cli.common import allow_owned_plugins, owner_parser, run
from client.store.open import inspect_store
from common.errors import AntherError
from conf.schemas import sampling
from models.diffusion.decoding import TILE
from models.diffusion.sampling import SAMPLERS
from models.quantization.modes import WEIGHT_MODES
from privacy.storage import FileStorage

if TYPE_CHECKING:
    from client.store.store import Store
    from models.base.base import Base
    from models.lora.adapter import Adapter

ADAPTERS = ("personal", "shared", "base")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return exit status 2, with one line on standard error, if drawing isn't possible."""
    parser = owner_parser("draw", __doc__ or "")
    parser.add_argument("captions", nargs="+", help="what to draw")
    parser.add_argument("--base", default="glyphs", help="name of a shipped base, or folder of a pipeline or its pack")
    parser.add_argument(
        "--weights", default="fp32", choices=tuple(WEIGHT_MODES), help="precision of the base in memory"
    )
    parser.add_argument(
        "--under", default="personal", choices=ADAPTERS, help="adapters to use; shared: without your personal one"
    )
    parser.add_argument("--sampler", default=sampling.SAMPLER, choices=SAMPLERS)
    parser.add_argument(
        "--steps", type=int, default=sampling.STEPS, help="1 to 4 with lcm or ancestral, if distilled for it"
    )
    parser.add_argument(
        "--guidance",
        type=float,
        default=sampling.GUIDANCE_SCALE,
        help="strength of the caption; 1: no guidance, for bases distilled to few steps",
    )
    parser.add_argument(
        "--guide-strength",
        type=float,
        default=sampling.GUIDE_STRENGTH,
        help="strength of your personal adapter in what guidance compares with; 1: classifier-free guidance; less: "
        "guidance also strengthens its effect",
    )
    parser.add_argument("--resolution", type=int, help="side in pixels (default: the base's resolution)")
    parser.add_argument("--small-vae", type=Path, metavar="DIR", help="an AutoencoderTiny for decoding")
    parser.add_argument("--tile", type=int, default=TILE, help="side in pixels of tiles for decoding; 0: no tiles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("drawn"), metavar="DIR", help="folder of the pictures")
    return run(parser, arguments, draw)


def draw(files: FileStorage, options: argparse.Namespace) -> str:
    """Draw every caption; return the paths of the pictures.

    Raises:
        AntherError: there is no personal adapter, it belongs to another base, or an option is out of range.
    """
    from PIL import Image

    from models.base.base import load
    from models.diffusion.sites import exact_pattern
    from models.lora.adapter import guides_of
    from training.capacity import budget, inference_share
    from training.inference import generate_with

    _check(options)
    allow_owned_plugins()
    store = inspect_store(files).store
    sites = store.personal_sites()
    base = load(
        options.base,
        sites=exact_pattern(sites) if sites else None,
        weights=options.weights,
        device="auto",
        resolution=options.resolution,
    )
    adapters = _adapters(store, base, options.under)
    latents = generate_with(
        base,
        options.captions,
        adapters,
        seed=options.seed,
        sampler=options.sampler,
        steps=options.steps,
        guidance=options.guidance,
        memory=inference_share(budget(None, base.device)),
        guides=None if options.guide_strength == 1 else guides_of(adapters, options.guide_strength),
    )
    pictures = base.decode(latents, small=options.small_vae, tile=options.tile or None)
    options.out.mkdir(parents=True, exist_ok=True)
    written = []
    for number, (caption, picture) in enumerate(zip(options.captions, pictures, strict=True), start=1):
        suffix = "" if options.under == "personal" else f"-{options.under}"  # different names in one folder
        written.append(options.out / f"{number:02}{suffix}-{_slug(caption)}.png")
        Image.fromarray(picture).save(written[-1])
    return "\n".join(map(str, written))


def _check(options: argparse.Namespace) -> None:
    """Check the options that would otherwise fail only after the base was loaded."""
    for name, valid, rule in (
        ("steps", 1 <= options.steps <= 1000, "1 to 1000"),
        ("guidance", 1 <= options.guidance <= 1000, "1 to 1000"),
        ("guide-strength", 0 <= options.guide_strength <= 1, "0 to 1"),
        ("resolution", options.resolution is None or 8 <= options.resolution <= 8192, "8 to 8192"),
        ("tile", 0 <= options.tile <= 8192, "0 to 8192"),
        ("seed", 0 <= options.seed < 2**63, "0 to 2⁶³ − 1"),
        ("out", not (options.out.is_file() or options.out.suffix.lower() in (".png", ".jpg", ".jpeg")), "a folder"),
    ):
        if not valid:
            raise AntherError(f"--{name} {getattr(options, name.replace('-', '_'))}: must be {rule}")
    if empty := next((caption for caption in options.captions if not caption.strip()), None):
        raise AntherError(f"{empty!r}: the caption is empty")


def _adapters(store: Store, base: Base, selected: str) -> list[Adapter]:
    """Return the adapters to add to the base."""
    if selected == "base":
        return []
    personal = store.personal(base.sites)
    if personal is None:
        raise AntherError(
            f"{store.where}: nothing was learned here yet: draw with --under base, or take part in a federation"
        )
    if personal.base != base.hash:
        raise AntherError(
            f"{store.where}: the learned adapter belongs to another base ({personal.base[:12]}), this one is "
            f"{base.hash[:12]}: name that with --base"
        )
    shared = personal.effective_shared
    return [shared, personal.adapter] if selected == "personal" else [shared]


def _slug(caption: str) -> str:
    """Convert a caption to a file name."""
    return re.sub(r"\W+", "-", caption.lower()).strip("-")[:40] or "picture"


if __name__ == "__main__":
    sys.exit(main())
