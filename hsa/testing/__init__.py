"""Whisper-shaped checkpoints with made-up numbers, and the demo."""
