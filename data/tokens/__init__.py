"""From documents to token ids: tokenizers, chat templates, and the store of tokens on disk."""
