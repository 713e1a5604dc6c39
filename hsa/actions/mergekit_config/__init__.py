"""mergekit's YAML, read as mergekit 0.1.5 reads it, as a merge that this package's own engine runs.

`hsa.integrations.mergekit` runs mergekit itself on such a file; nothing here imports mergekit.
"""
