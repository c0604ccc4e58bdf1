"""Tiny models, workloads, machine records and plots for the benchmarks."""
