"""The round loop: runners (synchronous, FedBuff), collection of replies, state, checkpoints."""
