"""Checkpoints: trees of arrays by name, each leaf and file with its digest."""
