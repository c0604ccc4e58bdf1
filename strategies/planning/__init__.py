"""Training plans that fit each device's memory, time and power."""
