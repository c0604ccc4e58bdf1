"""Flower's entry point of a device: `client.app:app`."""

from client.runtime.client_app import app

__all__ = ["app"]
