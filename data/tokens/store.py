"""The token store: a corpus split tokenized once, memory-mapped ever after.

`tokens.bin` holds each document as [bos] t1 .. tn [eos] (uint16, or uint32 past 65536 ids), `offsets.npy`
where each begins. The inputs of a document are its first n+1 entries and its targets the last n+1, so the
target at an address is simply the next entry: packing never has to ask where a document ends. Where the
encoding gives weights, `weights.bin` holds one uint8 an entry: what it counts in the loss as a target.

Past FILE_BYTES the tokens lie in several files, `tokens-00000-of-00012.bin`, each of whole documents. A store
that has grown (`data.tokens.generations`) has none of its own: its manifest names the stores that it
consists of. Either way the tokens are one array, see `data.tokens.joined_memmap`.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Integer, Num, UInt8

from data.cache import verify
from data.errors import DataError
from data.formats import WANTED
from data.sources.documents import Documents
from data.tokens.encoding import Encoding
from data.tokens.joined_memmap import first_entries, mapped
from data.tokens.shards import (
    BLOCK_BYTES,
    BLOCK_DOCUMENTS,
    JOURNAL,
    Engine,
    Record,
    ShardTask,
    lengths_of,
    local_engine,
    make_shards,
    path_of,
    token_dtype,
)

JOB_BYTES = 2 << 20  # text in a shard of work, at the least
MAX_SHARDS = 4096  # shards of work, at the most: past 8 GB of text they grow instead
CHUNK = 1 << 20  # tokens looked up at a time
FILE_BYTES = 4 << 30  # tokens in a file of a finished store, at the most (save a single shard that has more)


class _File(NamedTuple):
    """A file of tokens: entries and documents in it."""

    path: Path
    entries: int
    documents: int


@dataclass(frozen=True)
class TokenStore:
    """Tokenized documents of one split, in TFDS's order.

    `num_tokens` counts targets: every document's tokens and one separator. `num_bytes` counts the text's
    UTF-8 bytes. `offsets` counts entries from 0; where tokens lie in several files, `gaps` has (first
    document, entries by which its address exceeds its offset) for each file: see `starts`.
    """

    path: Path
    tokens: Integer[np.ndarray, " N"]
    offsets: Int[np.ndarray, " D1"]  # num_documents + 1
    token_bytes: Int[np.ndarray, " V"]
    num_bytes: int
    bos_id: int
    eos_id: int
    weights: UInt8[np.ndarray, " N"] | None = None  # of each entry as a target; None: all count
    gaps: tuple[tuple[int, int], ...] = ((0, 0),)
    # Fields of a batch that each entry has as a target, [N] or [K, N]: what other weights say of it.
    figures: Mapping[str, Num[np.ndarray, "*K N"]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path, *, contents: bool = True) -> "TokenStore":
        """Map a store, every file's sha256 checked. Raises DataError when one is missing or corrupt.

        Without `contents` only sizes are checked: where another process has just read it all.
        """
        path = Path(path)
        about = verify(path, contents=contents)
        parts = [path.parent / name for name in about.get("parts", ())] or [path]
        said = [verify(part, contents=contents) for part in parts] if "parts" in about else [about]
        offsets = [np.load(part / "offsets.npy", mmap_mode="r") for part in parts]
        each = zip(parts, said, offsets, strict=True)
        files = [file for part, facts, own in each for file in _files(part, facts, own)]
        weighted = (parts[0] / files[0].path.name.replace("tokens", "weights")).exists()
        return cls(
            path=path,
            tokens=_mapped(files, np.dtype(said[0]["dtype"])),
            offsets=offsets[0] if len(parts) == 1 else _joined(offsets),
            token_bytes=np.load(parts[0] / "token_bytes.npy"),
            num_bytes=sum(facts["num_bytes"] for facts in said),
            bos_id=said[0]["bos_id"],
            eos_id=said[0]["eos_id"],
            weights=_mapped(files, np.dtype(np.uint8), "weights") if weighted else None,
            gaps=_gaps(files),
        )

    @property
    def num_addresses(self) -> int:
        """How many addresses `tokens` has, entries and what lies between its files."""
        return int(self.starts[-1] + self.lengths[-1]) + 1

    @property
    def num_documents(self) -> int:
        """How many documents."""
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """How many targets an epoch has: tokens, and one separator a document."""
        return int(self.offsets[-1]) - self.num_documents

    def framed_weights(self) -> Iterator[UInt8[np.ndarray, " T"]] | None:
        """Yield the weights of each document's entries, as `framed` its entries; None where all count."""
        if self.weights is None:
            return None
        weights, ends = self.weights, self.starts + self.lengths + 1
        return (weights[start:end] for start, end in zip(self.starts, ends, strict=True))

    def learnt(self) -> Iterator[Bool[np.ndarray, " T"]] | None:
        """Yield of each document which entries are learnt as targets: those of an answer that was wanted."""
        weights = self.framed_weights()
        return None if weights is None else (own == WANTED for own in weights)

    @cached_property
    def wanted(self) -> Int[np.ndarray, " W"]:
        """Which documents' answers were wanted, of judged texts (`data.tokens.forms`)."""
        marks = (int(own.max(initial=0)) for own in self.framed_weights() or ())
        return np.flatnonzero(np.fromiter(marks, np.uint8) == WANTED)

    @property
    def learnt_bytes(self) -> int:
        """UTF-8 bytes of the targets that are learnt."""
        if self.weights is None:
            return self.num_bytes
        return int(self.token_bytes[self.tokens[np.flatnonzero(self.weights == WANTED)]].sum())

    def text_bytes(self, counted: int) -> int:
        """Return the text's bytes that tokens stand for whose `token_bytes` add up to `counted`.

        The split's own bytes are shared out over its tokens: where a vocabulary drops spaces or case, pieces
        do not add up to their text. Where they do, it is `counted`.
        """
        return round(counted * self.num_bytes / self._counted) if self._counted else counted

    @cached_property
    def _counted(self) -> int:
        """`token_bytes` of the whole split, read file by file: between files lie entries of nobody."""
        firsts = [first for first, _ in self.gaps]
        total = 0
        for (first, shift), last in zip(self.gaps, [*firsts[1:], self.num_documents], strict=True):
            start, end = (int(self.offsets[document]) + shift for document in (first, last))
            for at in range(start, end, CHUNK):
                total += int(self.token_bytes[self.tokens[at : min(at + CHUNK, end)]].sum(dtype=np.int64))
        return total

    @property
    def starts(self) -> Int[np.ndarray, " D"]:
        """Address of each document's bos in `tokens` and `weights`."""
        if len(self.gaps) == 1:
            return self.offsets[:-1]
        firsts, shifts = zip(*self.gaps, strict=True)
        return self.offsets[:-1] + np.repeat(shifts, np.diff([*firsts, self.num_documents]))

    @property
    def lengths(self) -> Int[np.ndarray, " D"]:
        """Inputs (equally, targets) of each document."""
        return np.diff(self.offsets) - 1

    def refuse_longer(self, length: int) -> None:
        """Raise DataError where a text, judged as a whole, does not fit into a row of so many tokens."""
        if (longest := int(self.lengths.max(initial=0))) > length:
            count = int((self.lengths > length).sum())
            raise DataError(
                f"data.seq_len={length}: {count:,} of {self.num_documents:,} judged texts are longer, the "
                f"longest {longest} tokens; use data.seq_len={longest}, or leave them out of the file"
            )

    def document(self, index: int) -> Int[np.ndarray, " T"]:
        """Return [bos] + tokens of a document, int32."""
        return np.asarray(self._framed(index)[:-1], dtype=np.int32)

    def framed(self) -> Iterator[Integer[np.ndarray, " T"]]:
        """Yield each document as stored: [bos] + tokens + [eos]."""
        for index in range(self.num_documents):
            yield self._framed(index)

    def _framed(self, index: int) -> np.ndarray:
        shift = next(shift for first, shift in reversed(self.gaps) if first <= index)
        return self.tokens[self.offsets[index] + shift : self.offsets[index + 1] + shift]


def _files(directory: Path, about: dict[str, Any], offsets: np.ndarray) -> list[_File]:
    if "files" not in about:
        return [_File(directory / "tokens.bin", int(offsets[-1]), len(offsets) - 1)]
    return [_File(directory / name, entries, documents) for name, entries, documents in about["files"]]


def _mapped(files: list[_File], dtype: np.dtype, kind: str = "tokens") -> np.ndarray:
    paths = [file.path.with_name(file.path.name.replace("tokens", kind)) for file in files]
    return mapped(paths, [file.entries for file in files], dtype)


def _joined(offsets: list[np.ndarray]) -> np.ndarray:
    """One count of entries over several stores."""
    before = np.cumsum([0, *(int(own[-1]) for own in offsets)])
    return np.concatenate([[0], *(own[1:] + first for own, first in zip(offsets, before, strict=False))])


def _gaps(files: list[_File]) -> tuple[tuple[int, int], ...]:
    counts = [file.entries for file in files]
    documents = np.cumsum([0, *(file.documents for file in files)]).tolist()
    before = np.cumsum([0, *counts]).tolist()
    addresses = zip(documents, first_entries(counts), before, strict=False)
    return tuple((first, address - entry) for first, address, entry in addresses)


def write_store(
    directory: Path,
    documents: Documents,
    encoding: Encoding,
    *,
    workers: int,
    about: dict[str, Any],
    advance: Callable[[int], None] = lambda documents: None,
    engine: Engine | None = None,
) -> None:
    """Tokenize a split into `directory` and add to `about` what `TokenStore.open` reads from the manifest.

    What an earlier call left finished in `directory` is taken over where `about` says the same. The bytes
    written depend neither on that, nor on `workers`, nor on `engine` (by default `workers` processes here).
    """
    encoder = encoding.open()
    dtype = token_dtype(encoder.vocab_size)
    cut = _jobs(documents)
    work = ShardTask(directory / JOURNAL, documents, encoding, _block(documents))
    inputs = {**about, "dtype": dtype.str, "weighted": encoder.weighted}
    engine = engine or local_engine(workers)
    records = make_shards(work, cut, inputs, engine, workers=workers, advance=advance)
    groups = _groups(records, dtype.itemsize)
    names = [f"tokens-{number:05d}-of-{len(groups):05d}.bin" for number in range(len(groups))]
    names = names if len(groups) > 1 else ["tokens.bin"]
    for name, group in zip(names, groups, strict=True):
        _gather(work.directory, group, "tokens", directory / name)
        if encoder.weighted:
            _gather(work.directory, group, "weights", directory / name.replace("tokens", "weights"))
    _write_offsets(directory / "offsets.npy", work.directory, records)
    np.save(directory / "token_bytes.npy", encoder.token_bytes())
    shutil.rmtree(work.directory)
    about |= {
        "dtype": dtype.str,
        "num_bytes": sum(record["num_bytes"] for record in records),
        "bos_id": encoder.bos_id,
        "eos_id": encoder.eos_id,
    }
    if len(groups) > 1:
        about["files"] = [
            [name, *(sum(record[key] for record in group) for key in ("entries", "documents"))]
            for name, group in zip(names, groups, strict=True)
        ]


def _jobs(documents: Documents) -> list[range]:
    """Cut the split into shards of work: runs of documents of about JOB_BYTES each."""
    count = len(documents)
    size = max(_documents_in(JOB_BYTES, documents), -(-count // MAX_SHARDS))
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def _block(documents: Documents) -> int:
    return _documents_in(BLOCK_BYTES, documents)


def _documents_in(size: int, documents: Documents) -> int:
    """How many documents have about so many bytes, were all alike."""
    return max(1, min(BLOCK_DOCUMENTS, len(documents) * size // max(documents.num_bytes, 1)))


def _groups(records: list[Record], itemsize: int) -> list[list[Record]]:
    """Put shards, in order, into files of FILE_BYTES at the most."""
    groups: list[list[Record]] = [[]]
    size = 0
    for record in records:
        more = record["entries"] * itemsize
        if groups[-1] and size + more > FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(record)
        size += more
    return groups


def _gather(journal: Path, records: list[Record], kind: str, target: Path) -> None:
    """Write the shards in a row. They stay until the store is whole: a kill in here costs nothing."""
    with open(target, "wb") as out:
        for record in records:
            with open(path_of(journal, record["number"], kind), "rb") as shard:
                shutil.copyfileobj(shard, out, 1 << 20)
        out.flush()
        os.fsync(out.fileno())


def _write_offsets(path: Path, journal: Path, records: Sequence[Record]) -> None:
    """Write where each document begins, and the end of the last, shard by shard."""
    count = sum(record["documents"] for record in records)
    with open(path, "wb") as out:
        header = {"descr": np.dtype(np.int64).str, "fortran_order": False, "shape": (count + 1,)}
        np.lib.format.write_array_header_1_0(out, header)
        out.write(np.zeros(1, np.int64).tobytes())
        end = 0
        for record in records:
            ends = np.cumsum(lengths_of(journal, record), dtype=np.int64) + end
            out.write(ends.tobytes())
            end = int(ends[-1])
