"""Teachers: frozen image diffusion models. ``base.Teacher`` is their common interface."""
