"""Load an adapter of a run into diffusers, and generate pictures with and without it.

    python examples/load_in_diffusers.py outputs/DATE/TIME/adapters/shared.safetensors --caption "lowercase letter a"

The base is the folder of the pipeline that the adapter was trained on; the default is the shipped letter base.
"""

# %% Arguments
from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from models.files.assets import locate

parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
parser.add_argument("adapter", type=Path)
parser.add_argument("--base", default="glyphs", help="a shipped base, or the folder of a pipeline")
parser.add_argument("--caption", default="lowercase letter a")
parser.add_argument("--size", type=int, help="side in pixels; default: the base's resolution")
parser.add_argument("--out", type=Path, default=Path("adapter.png"))
arguments = parser.parse_args()

# %% The same noise with and without the adapter
pipeline = DiffusionPipeline.from_pretrained(locate(arguments.base))


def generate() -> Image.Image:
    """Generate one picture from a fixed seed."""
    size = {"height": arguments.size, "width": arguments.size} if arguments.size else {}
    generator = torch.Generator().manual_seed(0)
    image: Image.Image = pipeline(arguments.caption, num_inference_steps=20, generator=generator, **size).images[0]
    return image


before = generate()
pipeline.load_lora_weights(str(arguments.adapter.parent), weight_name=arguments.adapter.name)
after = generate()

# %% Side by side
both = Image.new("RGB", (2 * before.width, before.height))
both.paste(before, (0, 0))
both.paste(after, (before.width, 0))
both.save(arguments.out)
print(arguments.out)
