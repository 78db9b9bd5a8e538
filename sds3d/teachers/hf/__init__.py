"""Teachers from diffusers pipelines, of a folder or of the hub. ``loading.load`` makes one; this package alone knows
diffusers and transformers, and imports them when a teacher is loaded."""
