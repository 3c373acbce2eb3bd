"""What was prepared: the stores that training reads, where they lie, and what a run of them has to beat."""

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.files import write_text
from data.sources.documents import Documents
from data.tokens.bigram import bigram_bits_per_byte
from data.tokens.store import TokenStore
from data.tokens.tokenizer import Tokenizer

BIGRAM_TOKENS = 1 << 24  # training tokens that the bigram baseline counts
BLOCK = 64  # documents read at a time


@dataclass(frozen=True)
class Prepared:
    """What training reads. `train` is None in streaming mode, where `documents` is read instead.

    Of a mixture `components` has what each is by name, and `train` and `validation` are None.
    `digest` covers the corpus and the tokenizer, not how they are packed. `description` is json-able: source,
    digests and paths, documents, tokens and bytes of each split, and under "rebuilt" why anything was built
    again.
    """

    tokenizer: Tokenizer
    train: TokenStore | None
    validation: TokenStore | None
    documents: Documents | None
    digest: str
    description: dict[str, Any]
    components: dict[str, "Prepared"] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Where everything lies, json-able: what `follow` makes the same of in another process."""
        stores = {"train": self.train, "validation": self.validation}
        documents = self.documents
        return {
            "stores": {name: str(store.path.absolute()) for name, store in stores.items() if store},
            "documents": documents
            and [str(documents.directory.absolute()), documents.split, documents.text_key],
            "digest": self.digest,
            "description": self.description,
            "components": {name: part.facts() for name, part in self.components.items()},
        }

    def bigram_bits_per_byte(self) -> float:
        """Return a bigram model's held-out bits per byte: what a run has to beat.

        Of a mixture: one model of all components' tokens, and held-out text weighed by the final shares, as
        the run's own figure is.
        """
        shares = self.description.get("final_shares")
        if shares is not None:
            return self._mixed_bigram(shares)
        assert self.validation is not None
        cached = self.validation.path.with_name(f"bigram-{self.digest[:16]}.json")
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return float(json.loads(cached.read_text("utf-8"))["bits_per_byte"])
        value = bigram_bits_per_byte(
            _some(self.train.framed() if self.train else self._streamed()),
            self.validation.framed(),
            vocab_size=self.tokenizer.vocab_size,
            validation_bytes=self.validation.learnt_bytes,
            counted=self.validation.learnt(),
        )
        with contextlib.suppress(OSError):  # a cache that cannot be written costs a second next time
            write_text(cached, json.dumps({"bits_per_byte": value}), shared=True)
        return value

    def _mixed_bigram(self, shares: dict[str, float]) -> float:
        train = [
            list(_some(part.train.framed(), int(BIGRAM_TOKENS * shares[name])))
            for name, part in self.components.items()
            if part.train is not None and shares[name]
        ]
        bits = num_bytes = 0.0  # a token of the mixture
        for name, part in self.components.items():
            held_out = part.validation
            if held_out is None or not shares[name]:
                continue
            per_byte = bigram_bits_per_byte(
                itertools.chain(*train),
                held_out.framed(),
                vocab_size=self.tokenizer.vocab_size,
                validation_bytes=held_out.num_bytes,
            )
            bytes_per_token = held_out.num_bytes / held_out.num_tokens
            bits += shares[name] * per_byte * bytes_per_token
            num_bytes += shares[name] * bytes_per_token
        return bits / num_bytes

    def _streamed(self) -> Iterator[np.ndarray]:
        assert self.documents is not None
        for texts in _blocks(self.documents):
            for ids in self.tokenizer.encode_batch(texts):
                yield np.concatenate([[self.tokenizer.bos_id], ids, [self.tokenizer.eos_id]])


def _some(documents: Iterator[np.ndarray], limit: int = BIGRAM_TOKENS) -> Iterator[np.ndarray]:
    """Yield documents up to `limit` tokens; TFDS has shuffled them, so the first are a fair sample."""
    tokens = 0
    for ids in documents:
        yield ids
        tokens += len(ids)
        if tokens >= limit:
            return


def _blocks(documents: Documents) -> Iterator[list[str]]:
    for first in range(0, len(documents), BLOCK):
        yield documents.read(range(first, min(first + BLOCK, len(documents))))


def stores_of(source: Prepared | TokenStore | Mapping[str, TokenStore], split: str) -> dict[str, TokenStore]:
    """Return stores by the name of the component, in the order of names; "" is a corpus alone."""
    if isinstance(source, TokenStore):
        return {"": source}
    if isinstance(source, Prepared):
        parts = source.components or {"": source}
        source = {name: getattr(part, split) for name, part in parts.items()}
    assert all(store is not None for store in source.values())
    return dict(sorted(source.items()))
