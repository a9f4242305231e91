"""HTML pages of a run, a comparison, a sweep and a search."""
