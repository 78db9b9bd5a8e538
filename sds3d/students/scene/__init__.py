"""A 3D scene as a student: a density field of a hash grid, rendered from random cameras."""
