"""Smaller models: fewer bits, zeros, layers and factors, so that outputs change little; and what it costs."""
