"""Adapters for other programs. Each module is thin and optional, and no other part of the package imports it."""
