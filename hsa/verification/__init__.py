"""Verification of outputs, patches, sweeps and releases against their own records and their sources."""
