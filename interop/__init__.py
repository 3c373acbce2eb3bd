"""Weights in other formats, both ways: tables of names and dims, and files that are read by slices."""
