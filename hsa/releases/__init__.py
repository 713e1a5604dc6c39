"""Releases: a tree of outputs that is built from a recipe."""
