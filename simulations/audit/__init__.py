"""The privacy audit: canaries in the real training loop, and membership attacks on finished runs."""
