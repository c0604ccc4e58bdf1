"""The round loop: synchronous and FedBuff runners, collection of replies, state and checkpoints."""
