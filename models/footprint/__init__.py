"""Predicted memory, operations and traffic of a training step."""
