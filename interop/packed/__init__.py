"""Weights of few bits, as the files of others keep them."""
