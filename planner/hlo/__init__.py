"""Compiled programs read as text: collectives, loops, kernels, memory traffic."""
