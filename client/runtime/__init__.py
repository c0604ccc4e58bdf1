"""Processes of a device (supervisor, SuperNode, worker) and their connections."""
