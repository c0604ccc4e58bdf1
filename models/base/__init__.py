"""The frozen base that jobs share, and the command that packs it."""
