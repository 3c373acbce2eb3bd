"""Measures of the server and of its engine."""
