"""Code that runs on a device: its pictures, its store, and the generator that answers requests."""

from common import moved_commands

moved_commands.install()
