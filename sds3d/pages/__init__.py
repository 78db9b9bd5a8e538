"""HTML pages: of a run, of many runs, of a comparison."""
