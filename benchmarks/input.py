"""How fast batches are made: `python -m benchmarks.input`, on texts and tokens that it makes itself.

Cached rows are set against rows of 2049 tokens that Grain reads from an ArrayRecord file; tokenizing and
streaming against the tokenizer library's own batch rate on the same texts. Cases of a part run in turn.
Grain is a package of its own (`pip install grain`); `--without grain` leaves it out. Each part takes about a
minute; `--rounds` repeats more.
"""

import argparse
import importlib.util
import itertools
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure
from benchmarks.measure import alternate, ratio, timed
from data.config import DataConfig, TokenizerConfig
from data.loading.loader import Loader
from data.loading.prefetch import Prefetcher
from data.pipeline import follow, prepare
from data.tokens.encoding import TextEncoding
from data.tokens.store import TokenStore, write_store

SEQ_LEN, ROWS = 2048, 32
MEAN, SPREAD = 600, 1.0  # tokens of a document, lognormal
TOKENS = 24_000_000  # of the token file; 48 MB, all of it in the page cache
BATCHES = 60  # a round and case: about 4 million tokens
STREAMED = 24  # the same where text is tokenized
TEXT_BYTES = 48 << 20  # starting two processes takes a second, of which a real corpus notices nothing
VOCABULARY = 8192
GRAIN = "grain MapDataset, rows of 2049 in ArrayRecord"
LIBRARY = "the tokenizer library, one batch of all texts"
Case = Callable[[], float]  # seconds of its batches
Part = tuple[list[dict[str, Any]], dict[str, Any]]  # rows of the table, ratios


@measure.guarded
def main(argv: Sequence[str]) -> int:
    """Measure, print and write; the exit status."""
    parser = measure.arguments(
        "input",
        __doc__,
        "input",
        rounds=(5, "times that each case is asked"),
        cores=(2, "that this process and its own may use"),
    )
    parser.add_argument("--without", choices=["grain"], help="leave out what is not installed")
    asked = parser.parse_args(argv)
    measure.use_cores(asked.cores)
    with_grain = asked.without != "grain"
    if with_grain and not importlib.util.find_spec("grain"):
        raise ValueError("grain is not installed; run pip install grain, or add --without grain")
    with tempfile.TemporaryDirectory() as folder:
        rows, ratios = cached(Path(folder), asked.rounds, with_grain)
        more_rows, more_ratios = text(Path(folder), asked)
    sizes = {"seq_len": SEQ_LEN, "rows": ROWS, "mean_document": MEAN, "vocabulary": VOCABULARY}
    result = {
        "title": f"Input on {asked.cores} cores: batches of {ROWS} x {SEQ_LEN}, documents of {MEAN} tokens",
        "workload": sizes | {"cores": asked.cores, "grain": with_grain},
        "table": rows + more_rows,
        "ratios": ratios | more_ratios,
    }
    measure.publish(result, asked)
    return 0


def in_turn(cases: Mapping[str, Case], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case; one more round comes first, which warms."""
    return {name: seconds[1:] for name, seconds in alternate(cases, rounds + 1).items()}


def row(name: str, seconds: list[float], tokens: int, beside: str | None) -> dict[str, Any]:
    """The table's row of one case."""
    rates = measure.summary([tokens / s / 1e6 for s in seconds])
    return {
        "case": name,
        "million tokens/s": rates["median"],
        "quartiles": measure.quartiles(rates),
        "beside it": beside,
    }


# -- cached ------------------------------------------------------------------------------------------------


def cached(folder: Path, rounds: int, with_grain: bool) -> Part:
    """Batches of a token store by packing, alone and through the prefetching thread or a process; Grain."""
    store = synthetic_store(folder / "tokens")
    cases: dict[str, Case] = {}
    for packing in ("concat", "best_fit"):
        loader = cached_loader(store.path, packing)
        cases[f"cached, {packing}"] = steady(
            partial(next, map(loader.batch, itertools.count())), BATCHES, ready=1
        )
        if packing == "concat":
            cases["cached, concat, in the prefetching thread"] = in_thread(cached_loader(store.path), BATCHES)
            cases["cached, concat, in a process of its own"] = in_process(
                partial(cached_loader, store.path), BATCHES
            )
    if with_grain:
        cases[GRAIN] = grain_reader(folder / "rows.array_record", store)
    samples = in_turn(cases, rounds)
    beside = {p: ratio(samples[f"cached, {p}"], samples[GRAIN]) for p in ("concat", "best_fit") if with_grain}
    words = {f"cached, {p}": f"{measure.with_quartiles(found)} x grain" for p, found in beside.items()}
    tokens = BATCHES * ROWS * SEQ_LEN
    rows = [row(name, seconds, tokens, words.get(name)) for name, seconds in samples.items()]
    return rows, {f"cached {packing} over grain": found for packing, found in beside.items()}


def synthetic_store(path: Path) -> TokenStore:
    """Random tokens in documents of lognormal lengths, in the files of a real store."""
    random = np.random.default_rng(0)
    lengths = random.lognormal(np.log(MEAN) - SPREAD**2 / 2, SPREAD, TOKENS // MEAN)
    ends = np.cumsum(np.maximum(1, lengths).astype(np.int64) + 2)
    path.mkdir()
    random.integers(0, 50_000, int(ends[-1]), dtype=np.uint16).tofile(path / "tokens.bin")
    np.save(path / "offsets.npy", np.concatenate([np.zeros(1, np.int64), ends]))
    return open_store(path)


def open_store(path: Path) -> TokenStore:
    """The store without its manifest: only what a loader reads."""
    tokens = np.memmap(path / "tokens.bin", dtype=np.uint16, mode="r")
    offsets = np.load(path / "offsets.npy")
    return TokenStore(path, tokens, offsets, np.ones(50_000, np.int32), int(offsets[-1]), 0, 0)


def cached_loader(path: Path, packing: str = "concat") -> Loader:
    """A loader of the store's rows, here or in a process of its own."""
    config = DataConfig(seq_len=SEQ_LEN, packing=packing)
    return Loader(open_store(path), config, global_batch_size=ROWS, seed=0)


def grain_reader(path: Path, store: TokenStore) -> Case:
    """Batches of the same tokens, shuffled, read by Grain's threads; inputs and targets as int32, no more.

    The file holds rows of inputs and last target, one a record, uncompressed as the store is.
    """
    import grain
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    tokens = np.asarray(store.tokens)
    for first in range(0, len(tokens) - SEQ_LEN - 1, SEQ_LEN):
        writer.write(tokens[first : first + SEQ_LEN + 1].tobytes())
    writer.close()

    def arrays(record: bytes) -> dict[str, np.ndarray]:
        tokens = np.frombuffer(record, np.uint16).astype(np.int32)
        return {"tokens": tokens[:-1], "targets": tokens[1:]}

    source = grain.sources.ArrayRecordDataSource([str(path)])
    dataset = grain.MapDataset.source(source).shuffle(seed=0).map(arrays).repeat()
    batches: Iterator[Any] = iter(dataset.to_iter_dataset().batch(ROWS))
    # Its 16 threads have 500 rows ready.
    return steady(lambda: next(batches), BATCHES, ready=500 // ROWS + 1)


# -- thread or process -------------------------------------------------------------------------------------


def steady(take: Callable[[], Any], count: int, ready: int = 3) -> Case:
    """Seconds of so many batches from what makes them ahead, when those that lay ready are gone."""

    def measured() -> float:
        for _ in range(ready):
            take()
        seconds = timed(lambda: [take() for _ in range(count)])
        time.sleep(0.5)  # those that lie ready for the next round are made in nobody's time
        return seconds

    return measured


def in_thread(loader: Loader, count: int) -> Case:
    """Batches of the prefetching thread, as training has them."""
    return steady(Prefetcher(loader, start=loader.state()["step"], depth=2).next, count)


def in_process(make: Callable[[], Loader], count: int) -> Case:
    """Batches of a spawned process, pickled through a pipe, at most two of them waiting."""
    context = multiprocessing.get_context("spawn")
    batches: Any = context.Queue(maxsize=2)
    context.Process(target=_produce, args=(make, batches), daemon=True).start()
    batches.get()
    return steady(batches.get, count)


def _produce(make: Callable[[], Loader], batches: Any) -> None:
    loader = make()
    for step in itertools.count():
        batches.put(loader.batch(step))


# -- text --------------------------------------------------------------------------------------------------


def text(folder: Path, asked: argparse.Namespace) -> Part:
    """Tokenizing as `prepare` does and as streaming does, beside the library alone."""
    write_texts(folder / "texts")
    data = DataConfig(
        source="folder", path=str(folder / "texts"), cache_dir=str(folder / "cache"), mode="streaming",
        seq_len=SEQ_LEN, workers=asked.cores,
    )  # fmt: skip
    prepared = prepare(data, TokenizerConfig(vocab_size=VOCABULARY), progress=False)
    documents = prepared.documents
    assert documents is not None
    texts = documents.read(range(len(documents)))
    backend = prepared.tokenizer._backend
    tokens = sum(map(len, prepared.tokenizer.encode_batch(texts))) + len(texts)
    encoding = TextEncoding(Path(prepared.description["tokenizer_path"]))

    def library() -> float:
        return timed(lambda: backend.encode_batch_fast(texts, add_special_tokens=False))

    def store() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            return timed(
                lambda: write_store(Path(scratch), documents, encoding, workers=asked.cores, about={})
            )

    loader = Loader(prepared, data, global_batch_size=ROWS, seed=0)
    loader.batch(0)
    preparing, streaming = f"preparing, {asked.cores} processes", "streaming, in the prefetching thread"
    cases = {
        LIBRARY: library,
        preparing: store,
        streaming: in_thread(loader, STREAMED),
        "streaming, in a process of its own": in_process(
            partial(streamed_loader, prepared.facts(), data), STREAMED
        ),
    }
    done = {name: STREAMED * ROWS * SEQ_LEN if name.startswith("streaming") else tokens for name in cases}
    samples = in_turn(cases, asked.rounds)
    per_token = {name: [s / done[name] for s in seconds] for name, seconds in samples.items()}
    beside = {name: ratio(seconds, per_token[LIBRARY]) for name, seconds in per_token.items()}
    words = {name: f"{measure.with_quartiles(found)} x the library" for name, found in beside.items()}
    words.pop(LIBRARY)
    rows = [row(name, seconds, done[name], words.get(name)) for name, seconds in samples.items()]
    over = {"preparing": beside[preparing], "streaming": beside[streaming]}
    return rows, {f"{name} over the tokenizer library": found for name, found in over.items()}


def streamed_loader(facts: dict[str, Any], data: DataConfig) -> Loader:
    """A loader that tokenizes as it goes, in a process of its own."""
    return Loader(follow(facts), data, global_batch_size=ROWS, seed=0)


def write_texts(folder: Path) -> None:
    """Texts of lognormal lengths whose words are drawn by Zipf's law from a made-up vocabulary."""
    random = np.random.default_rng(0)
    letters, share = list("etaoinshrdlucmfwypvbgkqjxz"), zipf(26)
    sizes = random.integers(1, 11, 20_000)
    words = ["".join(random.choice(letters, size, p=share)) for size in sizes]
    chance = zipf(len(words))
    folder.mkdir()
    written = number = 0
    while written < TEXT_BYTES:
        count = max(5, int(random.lognormal(np.log(400) - SPREAD**2 / 2, SPREAD)))
        one = " ".join(words[i] for i in random.choice(len(words), count, p=chance)) + ".\n"
        (folder / f"{number}.txt").write_text(one, "utf-8")
        written, number = written + len(one), number + 1


def zipf(count: int) -> np.ndarray:
    """Chances of so many things, the commonest first."""
    chance = 1 / np.arange(1, count + 1)
    return chance / chance.sum()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
