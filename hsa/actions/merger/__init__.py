"""Merges of models in memory: their tensors as sources and as the destination of the result."""
