"""What a family of models is: the names of its tensors, its heads, its presets and its small files."""
