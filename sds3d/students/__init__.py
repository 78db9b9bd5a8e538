"""The students, which a run optimises: a scene, images, or a generator."""
