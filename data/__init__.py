"""Bytes to batches: sources, tokenizer, token store, packing, loader. numpy only, no jax."""
