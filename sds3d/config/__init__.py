"""The settings of runs: their dataclasses, and the code that reads and checks them."""
