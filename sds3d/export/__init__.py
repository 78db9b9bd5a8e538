"""Mesh files: from a field to a mesh, its colours, and the formats. All of it takes plain callables and tensors."""
