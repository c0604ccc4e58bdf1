"""Local training of many clients in shared passes. Uses PyTorch only, no Flower."""
