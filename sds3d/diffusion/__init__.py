"""Noise schedules, timesteps, guidance and samplers. Nothing here depends on a network."""
