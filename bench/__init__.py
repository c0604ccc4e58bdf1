"""Benchmarks of claims: commands that print a table and write JSON, each with a named peer in the same run."""

from common import moved_commands

moved_commands.install()
