"""Scenes: a field in a box, rendered from cameras around it."""
