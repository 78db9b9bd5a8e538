"""A run watched in a browser while it grows, and the studio: the same page with a queue of prompts."""
