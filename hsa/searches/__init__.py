"""Search for the merge that best recognises a user's own speech: methods and settings are compared by word error
rate."""
