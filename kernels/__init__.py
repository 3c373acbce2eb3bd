"""Fast sums on one device: no mesh, no model, no files."""
