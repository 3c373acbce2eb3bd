"""Where text comes from and how it becomes batches."""

from dataclasses import dataclass

SOURCES = ("stdlib", "folder", "tfds")
MODES = ("cached", "streaming")
PACKINGS = ("concat", "best_fit", "none")
TOKENIZERS = ("bpe", "file", "byte")


@dataclass
class DataConfig:
    """A corpus, its split, and its packing into rows of `seq_len` tokens."""

    source: str = "stdlib"
    path: str | None = None  # folder: where the files are; tfds: the prepared dataset's directory
    name: str | None = None  # tfds: builder name with config and version, as in `wiki40b/en:1.3.0`
    text_key: str = "text"
    train_split: str = "train"
    validation_split: str = "validation"
    validation_fraction: float = 0.05  # stdlib and folder: share of documents held out, by content hash
    cache_dir: str = ".cache/data"
    mode: str = "cached"
    packing: str = "concat"
    seq_len: int = 256
    workers: int = 2  # processes that tokenize
    prefetch: int = 2  # batches made ahead of the step


@dataclass
class TokenizerConfig:
    """`bpe` trains a byte-level BPE on the corpus, `file` reads a `tokenizer.json`, `byte` is the 256 bytes and one separator."""

    kind: str = "bpe"
    vocab_size: int = 4096  # bpe only, the separator included
    path: str | None = None  # file only
