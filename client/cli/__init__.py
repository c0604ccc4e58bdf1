"""Commands of a device's owner: `anther device …`."""
