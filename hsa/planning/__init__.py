"""From headers and parameters to an immutable plan of every byte of the output."""
