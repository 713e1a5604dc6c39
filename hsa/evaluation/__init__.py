"""Transcribe data sets with models and score what they wrote: the house of `hsa eval`."""
