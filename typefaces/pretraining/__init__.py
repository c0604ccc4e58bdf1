"""How the glyph base and the judge were trained: architectures, losses, and one resumable loop."""
