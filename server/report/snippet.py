"""Code for loading an adapter of a run into diffusers: the printed lines run unchanged, from any folder."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.base.base import Base
from models.files.loading import quiet_libraries
from models.quantization.packed import is_packed


@dataclass(frozen=True, kw_only=True)
class LoadingSnippet:
    """Properties of a base that determine how its adapters are loaded."""

    base: str
    """Folder of the base, absolute."""
    adapters: str
    """Folder of the adapters, absolute."""
    network: str
    """The pipeline's part that an adapter belongs to: 'unet' | 'transformer'."""
    resolution: int
    loads: bool = True
    """Whether diffusers' pipeline reads adapters."""
    binned: bool = False
    """Whether the pipeline changes the requested size by default."""
    packed: bool = False
    """Whether the base is quantized in a format that diffusers can't read."""
    kohya: bool = True
    """Whether there are files in kohya's layout."""
    ignored: int = 0
    """Sites that sd-scripts ignores."""

    def lines(self, name: str, caption: str) -> str:
        """Return Python code that generates a picture of a caption with an adapter.

        Args:
            name: the adapter's file in the folder of adapters.
        """
        file = str(Path(self.adapters) / name)
        base = "FOLDER OF THE BASE THAT WAS PACKED" if self.packed else self.base
        size = f"height={self.resolution}, width={self.resolution}"
        binned = ", use_resolution_binning=False" if self.binned else ""
        return "\n".join(
            [
                "from diffusers import DiffusionPipeline",
                *([] if self.loads else ["from models.export.fuse import fuse"]),
                "",
                f"pipe = DiffusionPipeline.from_pretrained({base!r})",
                f"pipe.load_lora_weights({file!r})" if self.loads else f"fuse(pipe.{self.network}, {file!r})",
                f"pipe({caption!r}, num_inference_steps=20, {size}{binned}).images[0].save('picture.png')",
            ]
        )


def loading_snippet(base: Base, adapters: Path) -> LoadingSnippet:
    """Describe the use of a folder's adapters with the base that they were made for."""
    import diffusers  # slow import, so only here

    with quiet_libraries():  # the attribute imports the pipeline's module
        pipeline: Any = getattr(diffusers, base.family.pipeline)
    kohya = base.family.kohya
    return LoadingSnippet(
        base=str(base.folder.resolve()),
        adapters=str(adapters.resolve()),
        network=base.family.network,
        resolution=base.resolution,
        loads=hasattr(pipeline, "load_lora_weights"),
        binned="use_resolution_binning" in inspect.signature(pipeline.__call__).parameters,
        packed=is_packed(base.folder / base.family.network),
        kohya=kohya is not None,
        ignored=len(kohya.ignored(base.sites)) if kohya else 0,
    )
