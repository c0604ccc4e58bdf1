"""What differs between diffusion bases, one small file for each family."""
