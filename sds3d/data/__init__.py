"""Training data with captions: the toybox's renders, digits, or a user's folder."""
