"""The frozen base: load, quantise, adapter sites, objective, sampling, export."""
