"""Malicious messages, clients and inputs."""
