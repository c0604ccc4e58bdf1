"""What runs on a device: its pictures, its store, and the one generator that answers requests."""
