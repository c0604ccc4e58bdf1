"""Seeds derived from names: the same on every machine, independent for different names."""

from __future__ import annotations

import hashlib


def derive_seed(*key: object) -> int:
    """Derive a 63-bit seed from the parts of a key, for reproducible randomness that needs no secrecy.

    The seed is the first 63 bits of SHA-256 over the parts' `str`, joined by U+001F. Labels in keys are part of the
    results: changing one changes every number that is drawn from it.
    """
    text = "\x1f".join(str(part) for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
