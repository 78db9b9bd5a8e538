"""Losses on a student from a teacher's predictions: one core, and a folder for each family of methods."""
