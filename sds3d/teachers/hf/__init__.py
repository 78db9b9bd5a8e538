"""Teachers from diffusers pipelines in a folder or on the hub; see ``loading.load``.

Only this package uses diffusers and transformers. It imports them when a teacher is loaded.
"""
