"""Forward process, sampling, and decoding of latents."""
