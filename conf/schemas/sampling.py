"""Defaults of every command that draws, chosen on development writers and people: see the glyph base's card."""

from __future__ import annotations

SAMPLER = "dpm"
STEPS = 12
GUIDANCE_SCALE = 8.0
GUIDE_STRENGTH = 0.5
