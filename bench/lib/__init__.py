"""Shared by the benchmarks: tiny models, workloads, machine records, plots."""
