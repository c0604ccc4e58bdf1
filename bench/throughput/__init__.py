"""Time per step, round and federation."""
