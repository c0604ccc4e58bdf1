"""Defaults of every command that draws, chosen on development writers and people: see the glyph base's card."""

from __future__ import annotations

SAMPLER = "dpm"
STEPS = 6
GUIDANCE_SCALE = 3.0
