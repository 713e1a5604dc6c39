"""The verbs over one output: merge, patch, apply; and merges of models that are in memory."""
