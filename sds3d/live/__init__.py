"""Pages in the browser: the live view of a run, and the studio, which adds a queue of prompts."""
