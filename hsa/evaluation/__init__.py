"""Measures how well a model transcribes: data, audio, normalisers, scores and their intervals."""
