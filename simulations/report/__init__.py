"""Terminal output, results and report of a simulation."""
