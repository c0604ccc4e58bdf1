"""The report of a run: one HTML page without external resources, plots, and experiment trackers."""
