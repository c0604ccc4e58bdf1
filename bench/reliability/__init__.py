"""Faults, soak runs, and federations of processes."""
