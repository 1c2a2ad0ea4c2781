"""Checkpoints on disk: where a model comes from, how its tensors are read, written and resumed. No numbers are changed here."""
