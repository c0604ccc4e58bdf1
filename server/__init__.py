"""The server: its Flower app, the round loop, checkpoints, evaluation and the report."""

from common import moved_commands

moved_commands.install()
