"""The one error that bad input raises: one line that names the key, the value, the limit and the remedy."""


class DataError(ValueError):
    """A corpus, tokenizer or cache that cannot be used, said in one line for the person who typed the command."""
