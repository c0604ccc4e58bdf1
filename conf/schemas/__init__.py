"""Typed schemas of all configurations (Hydra structured configs)."""
