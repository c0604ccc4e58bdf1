"""Predict how a device can train: search of options, preflight check, measured throughput."""
