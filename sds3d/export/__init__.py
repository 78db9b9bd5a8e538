"""Files for people: meshes, turntables, contact sheets. Everything here takes plain callables and tensors."""
