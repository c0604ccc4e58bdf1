"""Pictures as data URIs, so that a page needs no file beside it."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image


def png(pixels: np.ndarray) -> str:
    """The data URI of a uint8 picture, [H, W] grey or [H, W, 3] colour."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
