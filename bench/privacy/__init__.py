"""Utility under differential privacy, membership inference, mutants."""
