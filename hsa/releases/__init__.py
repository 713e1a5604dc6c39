"""A tree of outputs, made from a recipe."""
