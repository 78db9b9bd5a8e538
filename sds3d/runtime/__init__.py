"""The machine beneath: devices, memory, processes, files, and small types that every room needs."""
