"""What a device can tell of its power, heat and use, and what training took; nothing here imports torch."""
