"""What sizes, links, times and batteries are told in."""

GIB, MIB = 2**30, 2**20
HOUR = 3600
"""Seconds, and joules in a watt-hour."""
MEGABITS = 8 / 1e6
"""In a byte."""
