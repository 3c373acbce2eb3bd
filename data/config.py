"""Where text comes from and how it becomes batches."""

import difflib
from dataclasses import dataclass

SOURCES = ("stdlib", "folder", "tfds")
MODES = ("cached", "streaming")
PACKINGS = ("concat", "best_fit", "none")
TOKENIZERS = ("bpe", "file", "byte")


def _choice(key: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        near = difflib.get_close_matches(str(value), options, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{key}={value} is not one of {', '.join(options)}{hint}")


def _require(ok: bool, key: str, value: object, limit: str) -> None:
    # `ok` is False for nan as well: every comparison with it is.
    if not ok:
        raise ValueError(f"{key}={value} must be {limit}")


@dataclass
class DataConfig:
    """A corpus, its split, and its packing into rows of `seq_len` tokens."""

    source: str = "stdlib"  # stdlib | folder | tfds
    path: str | None = None  # folder: where the files are; tfds: the prepared dataset's directory
    name: str | None = None  # tfds: builder name with config and version, as in `wiki40b/en:1.3.0`
    text_key: str = "text"  # the field that holds the text, in jsonl, parquet and tfds records
    train_split: str = "train"  # tfds: a split or a slice of one, as in `train[:90%]`
    validation_split: str = "validation"  # tfds: the same for held-out documents
    validation_fraction: float = 0.05  # stdlib and folder: share of documents held out, by content hash
    cache_dir: str = ".cache/data"  # corpora, tokenizers and token stores, found again by hash
    mode: str = "cached"  # cached: tokenize once | streaming: tokenize while training
    packing: str = "concat"  # concat | best_fit | none: how documents fill rows
    seq_len: int = 256  # tokens in a row
    workers: int = 2  # processes that tokenize
    prefetch: int = 2  # batches made ahead of the step

    def __post_init__(self) -> None:
        """Each value by itself; what two values must agree on is checked in `configs.schema`."""
        _choice("data.source", self.source, SOURCES)
        _choice("data.mode", self.mode, MODES)
        _choice("data.packing", self.packing, PACKINGS)
        share = self.validation_fraction
        _require(0 < share < 1, "data.validation_fraction", share, "between 0 and 1, such as 0.05")
        _require(self.seq_len >= 2, "data.seq_len", self.seq_len, "2 or more")
        _require(self.workers >= 1, "data.workers", self.workers, "1 or more")
        _require(self.prefetch >= 1, "data.prefetch", self.prefetch, "1 or more")


@dataclass
class TokenizerConfig:
    """`bpe` trains a byte-level BPE on the corpus, `file` reads one, `byte` is 256 bytes and a separator."""

    kind: str = "bpe"  # bpe | file | byte
    vocab_size: int = 4096  # bpe only, the separator included
    path: str | None = None  # file only: a `tokenizer.json`

    def __post_init__(self) -> None:
        """Each value by itself; what two values must agree on is checked in `configs.schema`."""
        _choice("tokenizer.kind", self.kind, TOKENIZERS)
        limit = "257 or more: the 256 bytes and the separator"
        _require(self.vocab_size >= 257, "tokenizer.vocab_size", self.vocab_size, limit)
