"""How a document becomes entries of the token store: described in the parent, opened in each worker."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Integer, UInt8

from data.tokens.tokenizer import Tokenizer, load_tokenizer


class Encoded(NamedTuple):
    """One document as the store keeps it: [bos] t1 .. tn [eos].

    `weights` says what each entry counts in the loss where it is the target, 0 for nothing; None: all count.
    """

    ids: Integer[np.ndarray, " T"]
    weights: UInt8[np.ndarray, " T"] | None = None


@runtime_checkable
class Encoder(Protocol):
    """An encoding in use. `weighted` says whether its documents carry weights: all do, or none does."""

    weighted: bool
    vocab_size: int
    bos_id: int
    eos_id: int

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """Return one Encoded a text."""
        ...

    def token_bytes(self) -> Int[np.ndarray, " V"]:
        """Return how many UTF-8 bytes each id stands for."""
        ...


@runtime_checkable
class Encoding(Protocol):
    """What an encoder is made of: small, picklable, and sent to the workers, which open their own."""

    def open(self) -> Encoder:
        """Return the encoder. Raises DataError where its files are missing or invalid."""
        ...


@dataclass(frozen=True)
class TextEncoding:
    """Plain text, every token a target."""

    tokenizer: Path

    def open(self) -> "TextEncoder":
        """Read the tokenizer."""
        return TextEncoder(load_tokenizer(self.tokenizer))


class TextEncoder:
    """A tokenizer's ids between separators."""

    weighted = False

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.bos_id = tokenizer.bos_id
        self.eos_id = tokenizer.eos_id

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """Return [bos] + tokens + [eos] of each text."""
        bos, eos = np.array([self.bos_id], np.int32), np.array([self.eos_id], np.int32)
        return [Encoded(np.concatenate([bos, ids, eos])) for ids in self.tokenizer.encode_batch(texts)]

    def token_bytes(self) -> Int[np.ndarray, " V"]:
        """Return how many UTF-8 bytes each id stands for."""
        return self.tokenizer.token_bytes()
