"""From a plan to bytes, in bounded memory."""
