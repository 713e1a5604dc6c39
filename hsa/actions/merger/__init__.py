"""Merges of models that are in memory: their tensors as sources and as the place of the result."""
