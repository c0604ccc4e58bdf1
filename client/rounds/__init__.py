"""What a device does in a round: train, evaluate, personalize, and build the upload."""
