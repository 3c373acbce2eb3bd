"""Where it is computed: mesh, logical axes, shardings. Knows no model."""
