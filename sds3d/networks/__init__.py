"""Small networks, and tools for networks: running averages, low-rank adapters, an optimiser."""
