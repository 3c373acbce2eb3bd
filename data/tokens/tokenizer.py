"""Text to token ids and back: HF `tokenizers` behind one small class.

`bpe` and `byte` cut into bytes at bottom, so that any text comes back exactly. Texts never produce special
tokens, even where they spell one: only the store writes the separator.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from data.config import TokenizerConfig
from data.errors import DataError

SEPARATOR = "<|endoftext|>"
# In order of preference; the first that the vocabulary has is taken.
BOS = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", SEPARATOR, "<|end_of_text|>", "</s>")
EOS = ("<|end_of_text|>", "</s>", "<eos>", "[EOS]", SEPARATOR, "<|begin_of_text|>", "<s>")
# Said outright, because otherwise the library prints a warning into the terminal whenever the process forks.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


@runtime_checkable
class ChatPrompts(Protocol):
    """How a conversation is put to a model (`data.tokens.chat.ChatEncoder`)."""

    @property
    def stop_id(self) -> int:
        """The token that ends an answer."""
        ...

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the ids of the turns and of the next one's head."""
        ...

    def save(self, directory: Path) -> None:
        """Write the template into a directory, beside the tokenizer.json."""
        ...


class Tokenizer:
    """A `tokenizer.json` in use. `digest` is the sha256 of its text; `bos_id` opens and `eos_id` ends a
    document.
    """

    def __init__(self, text: str, where: str = "tokenizer.json"):
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_str(text)
        except Exception as error:  # the library raises bare Exception
            reason = str(error).splitlines()[0]
            raise DataError(
                f"tokenizer.path={where} is no valid tokenizer.json ({reason}); export it again"
            ) from None
        self._backend.encode_special_tokens = True  # `<|endoftext|>` in a text is thirteen characters
        self._backend.no_truncation()
        self._backend.no_padding()
        self._text = text
        self.digest: str = hashlib.sha256(text.encode()).hexdigest()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.bos_id: int = self._special(vocabulary, BOS, where)
        self.eos_id: int = self._special(vocabulary, EOS, where)
        self.chat: ChatPrompts | None = None  # how turns are written for a model that was taught them

    @staticmethod
    def _special(vocabulary: dict[str, int], names: Sequence[str], where: str) -> int:
        found = next((name for name in names if name in vocabulary), None)
        if found is None:
            raise DataError(
                f"tokenizer.path={where} has no separator; add one of {' '.join(sorted(names))} to it"
            )
        return vocabulary[found]

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        """Return the text's int32 ids, without specials."""
        return np.asarray(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, " T"]]:
        """Encode many texts at once, which is faster: no offsets are kept, and the library uses several
        threads.
        """
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(one.ids, dtype=np.int32) for one in encoded]

    def encode_with_specials(
        self, texts: Sequence[str]
    ) -> list[tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]]:
        """Return (ids, character where each begins) of texts whose special tokens are meant as such.

        Raises DataError where normalizing makes a special token of characters that do not spell it.
        """
        encoded = self._with_specials.encode_batch(list(texts), add_special_tokens=False)
        specials = self.specials_by_id
        for text, one in zip(texts, encoded, strict=True):
            for index, (start, end) in zip(one.ids, one.offsets, strict=True):
                if index in specials and text[start:end].strip() != specials[index].strip():
                    raise DataError(
                        f"data: {text[start:end]!r} becomes the special token {specials[index]} when it is "
                        "normalized; remove it from the text"
                    )
        return [
            (np.asarray(one.ids, np.int32), np.array([start for start, _ in one.offsets], np.int32))
            for one in encoded
        ]

    @cached_property
    def _with_specials(self) -> Any:
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self._text)  # another one: the flag below belongs to the whole backend
        backend.encode_special_tokens = False
        backend.no_truncation()
        backend.no_padding()
        return backend

    @cached_property
    def specials_by_id(self) -> dict[int, str]:
        """The vocabulary's special tokens."""
        added = self._backend.get_added_tokens_decoder()
        return {index: token.content for index, token in added.items() if token.special}

    def token(self, index: int) -> str:
        """Return a token as the vocabulary spells it."""
        piece = self._backend.id_to_token(index)
        assert piece is not None, f"{index} is no token"
        return piece

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, specials left out; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, path: str | Path) -> None:
        """Write the `tokenizer.json`, byte for byte what the digest covers."""
        Path(path).write_text(self._text, encoding="utf-8", newline="")

    def token_bytes(self) -> Int[np.ndarray, " V"]:
        """Return how many UTF-8 bytes each id stands for; specials and unused ids stand for none.

        Exact for byte-level vocabularies. For the others (Llama 2's `▁`, byte fallback) it is the decoded
        piece's length, which misses what the normalizer dropped.
        """
        counts = np.zeros(self.vocab_size, dtype=np.int32)
        added = self._backend.get_added_tokens_decoder()
        byte_level = "ByteLevel" in json.dumps(json.loads(self._text).get("decoder"))
        for piece, index in self._backend.get_vocab(with_added_tokens=True).items():
            if index not in added:
                counts[index] = len(piece) if byte_level else _piece_bytes(piece)
            elif not added[index].special:
                counts[index] = len(piece.encode())
        return counts


def _piece_bytes(piece: str) -> int:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    return len(piece.replace("▁", " ").encode())


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json`. Raises DataError when it is missing or invalid."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(
            f"tokenizer.path={path} cannot be read ({error.strerror}); give a tokenizer.json"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"tokenizer.path={path} is not UTF-8 at byte {error.start}; give a tokenizer.json"
        ) from None
    return Tokenizer(text, str(path))


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Make the `bpe` or `byte` tokenizer; the same texts give the same bytes of `tokenizer.json`.

    The vocabulary is smaller than `config.vocab_size` where the texts have too few pairs to merge.
    """
    backend = _empty_backend()
    if config.kind == "bpe":
        from tokenizers import pre_tokenizers, trainers

        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=[SEPARATOR],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend.to_str(pretty=True))


def _empty_backend() -> Any:
    """The 256 bytes, each its own id, then the separator; no merges yet."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(SEPARATOR, special=True, normalized=False)])
    return backend


def _byte_vocabulary() -> dict[str, int]:
    """Bytes as the printable characters of GPT-2's table: those that print stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return {table[byte]: byte for byte in range(256)}
