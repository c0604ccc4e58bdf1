"""How adapters are combined, devices chosen and asked: aggregation, selection, planning, and Flower's Strategy."""

from common import moved_commands

moved_commands.install()
