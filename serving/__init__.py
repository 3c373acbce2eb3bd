"""A trained model in use: generate and sample."""
