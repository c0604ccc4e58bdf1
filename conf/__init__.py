"""Hydra groups (YAML) and their typed schemas."""
