"""Texts that a run draws for its own training, and what they are worth."""
