"""The one error that bad input raises: one line that names the key, the value, the limit and the remedy."""


class DataError(ValueError):
    """A corpus, tokenizer or cache that cannot be used, in one line for whoever typed the command."""
