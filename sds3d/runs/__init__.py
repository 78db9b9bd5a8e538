"""A run from its settings to its files: what it is built of, its folder, and what a finished one is."""
