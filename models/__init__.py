"""What is computed: Flax nnx modules and pure functions. Sees no mesh, no optimizer, no files."""
