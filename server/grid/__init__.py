"""The server's view of its nodes: Flower's grid with validation, time limits and backoff."""
