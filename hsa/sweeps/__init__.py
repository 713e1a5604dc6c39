"""Many merges of one triple, over a grid of parameters."""
