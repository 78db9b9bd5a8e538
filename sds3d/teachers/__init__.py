"""Frozen image diffusion models that judge images; ``base.Teacher`` is what they have in common."""
