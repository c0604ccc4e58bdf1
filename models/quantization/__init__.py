"""Frozen weights in few bits: NF4 and int8 blocks, packed files."""
