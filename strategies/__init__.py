"""Federated strategy: aggregation of adapters, selection of devices, planning, and Flower's `Strategy`."""

from common import moved_commands

moved_commands.install()
