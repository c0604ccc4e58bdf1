"""Forward process, denoiser, sampling, and decoding of latents."""
