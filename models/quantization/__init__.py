"""Quantized frozen weights: NF4 and int8 blocks, and packed files."""
