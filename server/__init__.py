"""The server: its Flower app, the round loop, checkpoints, evaluation and the report."""
