"""The frozen base: loading, quantization, adapter sites, objective, sampling and export."""

from common import moved_commands

moved_commands.install()
