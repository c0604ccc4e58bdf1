"""Code that runs on a device: its pictures, its store, and the generator that answers requests."""
