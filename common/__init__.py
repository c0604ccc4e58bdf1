"""Utilities that every package may import: errors, units, seeding, files, locks, processes."""
