"""Puts model, mesh, data and optimizer together: state, step, loop, checkpoint, evaluation, reports."""
