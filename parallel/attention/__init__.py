"""Attention over a mesh: which kernel runs, and how it crosses devices."""
