"""Inspection of heads and task vectors before a merge, and of an output afterwards."""
