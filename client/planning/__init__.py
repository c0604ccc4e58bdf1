"""What a device can train: search of plans, preflight check, measured throughput."""
