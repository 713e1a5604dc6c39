"""Synthetic checkpoints, tests for merge methods, and the demo."""
