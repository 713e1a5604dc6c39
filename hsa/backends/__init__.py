"""Where the arithmetic of a merge runs."""
