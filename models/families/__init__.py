"""Differences between diffusion architectures, one small file per family."""
