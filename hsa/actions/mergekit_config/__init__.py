"""Read mergekit's YAML, as mergekit 0.1.5 reads it, into a merge that this package's own engine runs.

`hsa.integrations.mergekit` runs mergekit itself on such a file; nothing here imports mergekit.
"""
