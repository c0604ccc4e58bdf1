"""Build a strategy from a configuration."""
