"""Simulated devices: participants, hardware, availability, batteries, costs, storage."""
