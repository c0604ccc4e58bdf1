"""The device's side of a round: train, evaluate, personalize, and prepare the upload."""
