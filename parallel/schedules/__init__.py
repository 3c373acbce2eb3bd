"""In what order microbatches and layers are worked through: one interface, `value_and_grad` and its twins."""
