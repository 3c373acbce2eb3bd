"""A run on as many devices as there are."""
