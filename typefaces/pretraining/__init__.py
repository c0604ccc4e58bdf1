"""Training of the glyph base and the judge: architectures, losses, and one resumable loop."""
