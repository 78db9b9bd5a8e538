"""What is optimised: a scene, images, or a generator."""
