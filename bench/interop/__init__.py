"""Benchmarks of exchange with other tools."""
