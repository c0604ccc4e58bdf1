"""The built-in data set: each writer is a device with a few images of letters in one typeface."""

from common import moved_commands

moved_commands.install()
