"""Diffusion as pure mathematics: schedules, Gaussians, guidance and samplers. Imports nothing else of minisd."""
