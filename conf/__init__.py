"""Hydra configuration: groups (YAML), their typed schemas, and one-line errors."""
