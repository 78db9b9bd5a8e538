"""How good a result is: against the truth, against real images, and methods side by side."""
