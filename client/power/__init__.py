"""Power, heat and usage of a device, and the energy of training; nothing here imports torch."""
