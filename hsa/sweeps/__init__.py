"""Many merges of the same sources, over a grid of parameters."""
