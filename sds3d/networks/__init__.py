"""Small networks, and what is done to networks: averages, adapters, an optimiser."""
