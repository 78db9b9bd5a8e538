"""HTML pages of a run, of many runs, and of a comparison."""
