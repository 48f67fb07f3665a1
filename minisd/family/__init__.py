"""Networks beside Stable Diffusion's own, one per file."""
