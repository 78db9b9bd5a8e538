"""Diffusion itself: noise schedules, timesteps, guidance and samplers. Nothing here knows a network."""
