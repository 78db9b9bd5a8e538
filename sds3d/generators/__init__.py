"""Students that draw images from noise: in one step, or in a few."""
