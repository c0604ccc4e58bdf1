"""Differential privacy: clipping, noise, accounting, a device's ledger and its owner's policy."""
