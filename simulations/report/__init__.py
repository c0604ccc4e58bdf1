"""What a simulation prints and writes."""
