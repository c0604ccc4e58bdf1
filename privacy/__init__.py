"""Clipping, noise, accounting, ledger, policy."""
