"""Runs: their parts, their loop, their folders and their results."""
