"""Where text comes from and how it becomes batches."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from typing import Any

from common.checks import choice, did_you_mean, require, within
from data.curation.config import parse_steps
from data.formats import FORMS, GROUPS

# Kind of source → the class that answers for it (`data.sources.corpus.Source`), imported where it is asked.
SOURCES = {
    "stdlib": "data.sources.corpus:StdlibSource",
    "folder": "data.sources.corpus:FolderSource",
    "tfds": "data.sources.tfds:TfdsSource",
    "hf": "data.sources.hf:HfSource",
    "synthetic": "data.sources.synthetic:SyntheticSource",
}
BAD_RECORDS = ("stop", "skip")
FORMATS = ("text", *FORMS)
MODES = ("cached", "streaming")
PACKINGS = ("concat", "best_fit", "first_fit", "none")
OWN = ("weight", "epochs")  # what a component of a mixture has beside keys of `data`
# What all components of a mixture have in common.
SHARED = (
    *("cache_dir", "mode", "packing", "seq_len", "workers", "prefetch"),
    *("mixture", "curriculum", "virtual_shards"),
)
TOKENIZERS = ("bpe", "file", "byte", "inherit")


@dataclass
class DataConfig:
    """A corpus, its split, and its packing into rows of `seq_len` tokens."""

    source: str = "stdlib"  # stdlib | folder | tfds | hf | synthetic
    format: str = "text"  # text | chat | completion: of which only answers are learnt | pairs | labels
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
    packing: str = "concat"  # concat | best_fit | first_fit | none: how documents fill rows
    seq_len: int = 256  # tokens in a row
    workers: int = 2  # processes that tokenize
    prefetch: int = 2  # batches made ahead of the step
    steps: list[dict] = field(default_factory=list)  # sampling, filters: [{step: NAME, …}], in order
    mixture: dict[str, dict] = field(default_factory=dict)  # NAME: weight, epochs, and what of data differs
    curriculum: list[list[int]] = field(default_factory=list)  # [step, longest piece] pairs, growing
    virtual_shards: int = 0  # streaming: parts, each tokenized where its rows are; 0: all of it on each host

    def __post_init__(self) -> None:
        # A shell leaves the tilde of `data.path=~/texts` as it is.
        self.path = self.path and os.path.expanduser(self.path)
        self.cache_dir = os.path.expanduser(self.cache_dir)
        choice("data.source", self.source, SOURCES)
        choice("data.format", self.format, FORMATS)
        choice("data.on_bad_record", self.on_bad_record, BAD_RECORDS)
        choice("data.mode", self.mode, MODES)
        choice("data.packing", self.packing, PACKINGS)
        within("data.synthetic_documents", self.synthetic_documents, 20)  # the first held-out one
        within("data.seq_len", self.seq_len, 2)
        within("data.workers", self.workers, 1)
        within("data.prefetch", self.prefetch, 1)
        if self.generation is not None:
            within("data.generation", self.generation, 0)
            if self.source != "folder" or self.mode != "cached":
                raise ValueError(
                    f"data.generation={self.generation} needs data.source=folder and data.mode=cached: only "
                    "such corpora grow by prepare_data.py --append"
                )
        parse_steps(self.steps)
        within("data.virtual_shards", self.virtual_shards, 0)
        check_curriculum(self.curriculum, self.seq_len)
        share = self.validation_fraction
        require(0.0 < share < 1.0, "data.validation_fraction", share, "between 0 and 1, as 0.05 is")
        if self.mode == "streaming" and self.packing != "concat":
            raise ValueError(
                f"data.packing={self.packing} needs every document's length beforehand; "
                "use data.packing=concat with data.mode=streaming, or data.mode=cached"
            )
        if self.virtual_shards and self.mode != "streaming":
            raise ValueError(
                f"data.virtual_shards={self.virtual_shards} has no effect with data.mode={self.mode}, which "
                "is exact on any number of hosts; use data.virtual_shards=0, or data.mode=streaming"
            )
        if self.format != "text" and self.mode == "streaming":
            raise ValueError(
                f"data.format={self.format} weighs each token, which data.mode=streaming cannot; "
                "use data.mode=cached"
            )
        if self.format != "text" and self.source in ("stdlib", "synthetic"):
            raise ValueError(
                f"data.source={self.source} holds no conversations for data.format={self.format}; make some "
                "with scripts/make_chat_corpus.py, and use data=folder data.path=FILE.jsonl"
            )
        if self.format in GROUPS and (self.packing != "none" or self.mixture or self.curriculum):
            raise ValueError(
                f"data.format={self.format} has rows that belong together, one text each; use "
                "data.packing=none, and neither data.mixture nor data.curriculum"
            )
        if self.mixture:
            components(self)  # each of them is checked; of this one only what they share counts
            return
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


def component_keys() -> list[str]:
    """Return the keys that `data.mixture.NAME` may have."""
    return [*OWN, *(f.name for f in fields(DataConfig) if f.name not in SHARED)]


def check_curriculum(points: list[Any], seq_len: int) -> None:
    """Raise ValueError unless steps grow from 0 and lengths from 2 or more to `seq_len` at most."""
    try:
        steps, lengths = [p for p, _ in points], [n for _, n in points]
    except (TypeError, ValueError):
        steps, lengths = [None], [None]
    if not all(type(value) is int for value in steps + lengths):
        raise ValueError(
            f"data.curriculum={points} is no list of [step, length] pairs; "
            f"give whole numbers, as in [[0,{max(2, seq_len // 4)}],[1000,{seq_len}]]"
        )
    if points and (steps[0] != 0 or any(a >= b for a, b in zip(steps, steps[1:], strict=False))):
        raise ValueError(f"data.curriculum={points}: steps must grow from 0; the first pair begins at step 0")
    if any(a >= b for a, b in zip(lengths, lengths[1:], strict=False)):
        raise ValueError(f"data.curriculum={points}: lengths must grow from pair to pair")
    if points and not 2 <= min(lengths) <= max(lengths) <= seq_len:
        raise ValueError(
            f"data.curriculum={points}: lengths must lie between 2 and data.seq_len={seq_len}; "
            "raise data.seq_len, or drop the pairs past it"
        )


def shards_problem(shards: int, batch_size: int) -> str | None:
    """Say why so many virtual shards cannot share a batch, or None."""
    if not shards or batch_size % shards == 0:
        return None
    legal = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
    near = sorted(sorted(legal, key=lambda n: abs(n - shards))[:4])
    return (
        f"data.virtual_shards={shards} does not divide training.global_batch_size={batch_size}; "
        f"use {', '.join(map(str, near))}, or a multiple of {shards} rows"
    )


@dataclass
class TokenizerConfig:
    """What cuts text into tokens.

    `bpe` trains a byte-level BPE on the corpus, `file` reads a `tokenizer.json`,
    `byte` is the 256 bytes and one separator, `inherit` takes that of the run that `init_from` names.
    """

    kind: str = "bpe"  # bpe | file | byte | inherit
    vocab_size: int = 4096  # bpe only, the separator included
    path: str | None = None  # file only: a `tokenizer.json`
    chat_template: str | None = None  # of conversations: a Jinja file | plain (no frame); null: its own

    def __post_init__(self) -> None:
        self.path = self.path and os.path.expanduser(self.path)
        self.chat_template = self.chat_template and os.path.expanduser(self.chat_template)
        choice("tokenizer.kind", self.kind, TOKENIZERS)
        within("tokenizer.vocab_size", self.vocab_size, 257)  # 256 bytes and the separator
        if self.kind == "file" and not self.path:
            raise ValueError("tokenizer.kind=file needs tokenizer.path, a tokenizer.json")


Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Component:
    """One corpus of a mixture: its weight by [step, weight] points, and how often it may be read at most."""

    data: DataConfig
    weight: Points
    epochs: float | None


def components(data: DataConfig) -> dict[str, Component]:
    """Return the components of `data.mixture` by name, in the order of names.

    Raises ValueError, one line with the key, for what is wrong with one of them.
    """
    if data.mode == "streaming":
        raise ValueError(
            "data.mixture needs data.mode=cached: a stream cannot say beforehand how many rows a corpus has, "
            "so neither shares nor epochs would be exact; use data.mode=cached"
        )
    found = {name: _component(data, name, data.mixture[name]) for name in sorted(data.mixture)}
    for step in sorted({step for part in found.values() for step, _ in part.weight}):
        if not any(weight_at(part.weight, step) for part in found.values()):
            raise ValueError(
                f"data.mixture: all weights are 0 at step {step}; give one of them a weight there"
            )
    return found


def _component(data: DataConfig, name: str, values: Any) -> Component:
    key = f"data.mixture.{name}"
    if not isinstance(values, Mapping) or "weight" not in values:
        raise ValueError(f"{key} has no weight; give one, such as {key}.weight=1.0")
    if "/" in name or not name:
        raise ValueError(f"data.mixture has a component named {name!r}; use a name without a slash")
    for unknown in (k for k in values if k not in component_keys()):
        if unknown in SHARED:
            raise ValueError(f"{key}.{unknown} is the same for all components; set data.{unknown}")
        raise ValueError(f"{key}.{unknown} is not a key; {did_you_mean(unknown, component_keys())}")
    epochs = values.get("epochs")
    if epochs is not None and (not _is_number(epochs) or epochs <= 0):
        raise ValueError(f"{key}.epochs={epochs} is no positive number; use 1 or more, or null for no limit")
    own = {k: value for k, value in values.items() if k not in OWN}
    try:
        config = replace(data, mixture={}, curriculum=[], **own)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{key}: {error}") from None
    return Component(
        config, _points(f"{key}.weight", values["weight"]), None if epochs is None else float(epochs)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _points(key: str, value: Any) -> Points:
    pairs = [[0, value]] if _is_number(value) else value
    sound = isinstance(pairs, list) and pairs
    if not sound or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise ValueError(
            f"{key}={value} is neither a number nor a list of [step, weight]; use 1.0 or [[0,1.0]]"
        )
    if not all(type(step) is int and step >= 0 and _is_number(w) and w >= 0 for step, w in pairs):
        raise ValueError(f"{key}={value}: steps are whole numbers from 0, weights are numbers from 0")
    if any(a[0] >= b[0] for a, b in zip(pairs, pairs[1:], strict=False)):
        raise ValueError(f"{key}={value}: steps must grow from point to point")
    return [(step, float(weight)) for step, weight in pairs]


def weight_at(points: Points, step: int) -> Fraction:
    """Return a weight at a step, exactly: linear between points, constant outside."""
    after = next((i for i, (at, _) in enumerate(points) if at >= step), len(points))
    if after == 0 or after == len(points):
        return Fraction(points[min(after, len(points) - 1)][1])
    (a, u), (b, v) = points[after - 1], points[after]
    return Fraction(u) + (Fraction(v) - Fraction(u)) * Fraction(step - a, b - a)
