"""Search for the merge that recognises a user's own speech best: methods and settings, tried by word error rate."""
