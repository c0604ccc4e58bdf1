"""The values of one round: requests, updates, metrics, and their validation."""
