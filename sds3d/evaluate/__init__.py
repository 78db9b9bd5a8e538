"""Evaluation: of assets against true shapes, of generators against real images, and comparisons of methods."""
