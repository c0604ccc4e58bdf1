"""LoRA adapters: factors, batched layers, trainable parts."""
