"""How the packaged teachers are trained, and on what."""
