"""A fleet on one machine: profiles, the in-process grid, evaluation of the arms, run.py."""
