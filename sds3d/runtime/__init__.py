"""Devices, memory, processes and files, and the small types that all other packages use."""
