"""Weights that exist already: of runs, and of others who publish theirs."""
