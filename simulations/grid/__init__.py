"""Flower grids that simulate devices: in one process, on a virtual clock, on Ray."""
