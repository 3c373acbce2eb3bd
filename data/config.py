"""Where text comes from and how it becomes batches."""

import difflib
import os
from dataclasses import dataclass, field
from typing import Any

from data.steps.parse import parse_steps

SOURCES = ("stdlib", "folder", "tfds", "hf", "synthetic")
BAD_RECORDS = ("stop", "skip")
FORMATS = ("text", "chat")
MODES = ("cached", "streaming")
PACKINGS = ("concat", "best_fit", "none")
TOKENIZERS = ("bpe", "file", "byte", "inherit")


def _choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{key}={value} is not one of {', '.join(allowed)}{hint}")


def _at_least(key: str, value: int, limit: int) -> None:
    if value < limit:
        raise ValueError(f"{key}={value} is too small; use {limit} or more")


@dataclass
class DataConfig:
    """A corpus, its split, and its packing into rows of `seq_len` tokens."""

    source: str = "stdlib"  # stdlib | folder | tfds | hf | synthetic
    format: str = "text"  # text | chat: conversations, of which only the assistant's turns are learnt
    path: str | None = None  # folder, tfds, hf: where the files are, a directory or an s3:// or gs:// URL
    name: str | None = None  # tfds: `wiki40b/en:1.3.0`; hf: `org/repo:config@revision`; synthetic: a seed
    text_key: str = "text"  # the field that holds the text, in jsonl, parquet, tfds and hf records
    train_split: str = "train"  # tfds and hf: the name of a split
    validation_split: str = "validation"  # tfds and hf: the same for held-out documents
    download: bool = False  # tfds: let TFDS download and prepare data.name where it is absent
    synthetic_documents: int = 20000  # synthetic: how many, of 2 KB each; every twentieth is held out
    on_bad_record: str = "stop"  # stop | skip: what is no text in a corpus stops the run, or is counted
    generation: int | None = None  # folder: which one, of a corpus grown by `--append`; null: the newest
    validation_fraction: float = 0.05  # stdlib and folder: share of documents held out, by content hash
    cache_dir: str = ".cache/data"  # corpora, tokenizers and token stores, found again by hash
    mode: str = "cached"  # cached: tokenize once | streaming: tokenize while training
    packing: str = "concat"  # concat | best_fit | none: how documents fill rows
    seq_len: int = 256  # tokens in a row
    workers: int = 2  # processes that tokenize
    prefetch: int = 2  # batches made ahead of the step
    steps: list[Any] = field(
        default_factory=list
    )  # sampling, dedup, filters: [{step: NAME, …}], in this order

    def __post_init__(self) -> None:
        # A shell leaves the tilde of `data.path=~/texts` as it is.
        self.path = self.path and os.path.expanduser(self.path)
        self.cache_dir = os.path.expanduser(self.cache_dir)
        _choice("data.source", self.source, SOURCES)
        _choice("data.format", self.format, FORMATS)
        _choice("data.on_bad_record", self.on_bad_record, BAD_RECORDS)
        _choice("data.mode", self.mode, MODES)
        _choice("data.packing", self.packing, PACKINGS)
        _at_least("data.synthetic_documents", self.synthetic_documents, 20)  # the first held-out one
        _at_least("data.seq_len", self.seq_len, 2)
        _at_least("data.workers", self.workers, 1)
        _at_least("data.prefetch", self.prefetch, 1)
        if self.generation is not None:
            _at_least("data.generation", self.generation, 0)
            if self.source != "folder" or self.mode != "cached":
                raise ValueError(
                    f"data.generation={self.generation} needs data.source=folder and data.mode=cached: only "
                    "such corpora grow by prepare_data.py --append"
                )
        parse_steps(self.steps)
        if not 0.0 < self.validation_fraction < 1.0:
            raise ValueError(
                f"data.validation_fraction={self.validation_fraction} must lie between 0 and 1, as 0.05 does"
            )
        if self.mode == "streaming" and self.packing != "concat":
            raise ValueError(
                f"data.packing={self.packing} needs every document's length beforehand; "
                "use data.packing=concat with data.mode=streaming, or data.mode=cached"
            )
        if self.format == "chat" and self.mode == "streaming":
            raise ValueError(
                "data.format=chat weighs each token, which data.mode=streaming cannot; use data.mode=cached"
            )
        if self.format == "chat" and self.source in ("stdlib", "synthetic"):
            raise ValueError(
                f"data.source={self.source} holds no conversations for data.format=chat; make some with "
                "scripts/make_chat_corpus.py, and use data=folder data.path=FILE.jsonl"
            )
        if self.source == "folder" and not self.path:
            raise ValueError("data.source=folder needs data.path, the folder with your files")
        if self.source == "tfds" and not (self.path or self.name):
            raise ValueError(
                "data.source=tfds needs data.path, a prepared dataset's directory, or data.name "
                "with data.path as its TFDS root"
            )
        if self.source == "hf" and not (self.path or self.name):
            raise ValueError(
                "data.source=hf needs data.path, what save_to_disk wrote or a folder of data files, or "
                "data.name, as in data.name=org/repo:config@revision"
            )
        if self.source == "synthetic" and not (self.name or "0").isdecimal():
            raise ValueError(f"data.name={self.name} is no seed of data.source=synthetic; use a number, as 7")


@dataclass
class TokenizerConfig:
    """What cuts text into tokens.

    `bpe` trains a byte-level BPE on the corpus, `file` reads a `tokenizer.json`,
    `byte` is the 256 bytes and one separator, `inherit` takes that of the run that `init_from` names.
    """

    kind: str = "bpe"  # bpe | file | byte | inherit
    vocab_size: int = 4096  # bpe only, the separator included
    path: str | None = None  # file only: a `tokenizer.json`
    chat_template: str | None = None  # data.format=chat: a Jinja file; null: the tokenizer's own

    def __post_init__(self) -> None:
        self.path = self.path and os.path.expanduser(self.path)
        self.chat_template = self.chat_template and os.path.expanduser(self.chat_template)
        _choice("tokenizer.kind", self.kind, TOKENIZERS)
        _at_least("tokenizer.vocab_size", self.vocab_size, 257)  # 256 bytes and the separator
        if self.kind == "file" and not self.path:
            raise ValueError("tokenizer.kind=file needs tokenizer.path, a tokenizer.json")
