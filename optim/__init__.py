"""Gradient transformations and schedules in optax terms. Knows no model."""
