"""Conversion factors for sizes, times, energies and link speeds."""

GIB, MIB = 2**30, 2**20
HOUR = 3600
"""Seconds per hour, and joules per watt-hour."""
MEGABITS = 8 / 1e6
"""Megabits per byte."""
