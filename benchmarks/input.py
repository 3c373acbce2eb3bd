"""How fast batches are made: `python benchmarks/input.py`, on texts and tokens that it makes itself.

Cached rows are set against rows of 2049 tokens that Grain reads from an ArrayRecord file; tokenizing and
streaming against the tokenizer library's own batch rate on the same texts. Cases of a part run in turn.
Grain is a package of its own (`pip install grain`); `--without grain` leaves it out. Each part takes about a
minute; `--rounds` repeats more.
"""

import argparse
import itertools
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":  # found from a clone that was never installed, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import RESULTS, alternate, ratio, summary, timed, use_cores, write_result
from data.config import DataConfig, TokenizerConfig
from data.loading.loader import Loader, Prefetcher
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


def main() -> int:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(prog="python benchmarks/input.py", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--without", choices=["grain"], help="leave out what is not installed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    use_cores(asked.cores)
    if asked.without != "grain":
        try:
            import grain  # noqa: F401
        except ImportError:
            print(
                "error: grain is not installed; run pip install grain, or add --without grain",
                file=sys.stderr,
            )
            return 2
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in (cached(Path(folder), asked), text(Path(folder), asked)):
            rows += part[0]
            ratios |= part[1]
    workload = {
        "seq_len": SEQ_LEN,
        "rows": ROWS,
        "mean_document": MEAN,
        "vocabulary": VOCABULARY,
        "cores": asked.cores,
        "grain": asked.without != "grain",
    }
    title = f"Input on {asked.cores} cores: batches of {ROWS} x {SEQ_LEN}, documents of {MEAN} tokens"
    write_result("input", {"title": title, "workload": workload, "table": rows, "ratios": ratios}, asked.out)
    for row in rows:
        print(f"{row['case']:60} {row['million tokens/s']:10.3f}  {row['beside it'] or ''}")
    return 0


# Cached


def cached(folder: Path, asked: argparse.Namespace) -> tuple[list[dict], dict]:
    """Batches of a token store by packing, alone and through the prefetching thread or a process; Grain."""
    store = synthetic_store(folder / "tokens")
    cases: dict[str, Callable[[], float]] = {}
    for packing in ("concat", "best_fit"):
        config = DataConfig(seq_len=SEQ_LEN, packing=packing)
        loader = Loader(store, config, global_batch_size=ROWS, seed=0)
        cases[f"cached, {packing}"] = steady(partial(in_turn, loader, itertools.count()), BATCHES, ready=1)
        if packing == "concat":
            cases["cached, concat, in the prefetching thread"] = in_thread(
                Loader(store, config, global_batch_size=ROWS, seed=0), BATCHES
            )
            cases["cached, concat, in a process of its own"] = in_process(
                (cached_loader, (store.path,)), BATCHES
            )
    if asked.without != "grain":
        path = folder / "rows.array_record"
        write_rows(path, store)
        cases["grain MapDataset, rows of 2049 in ArrayRecord"] = grain_reader(path)
    samples = alternate(cases, asked.rounds + 1)
    samples = {name: seconds[1:] for name, seconds in samples.items()}  # the first round warms
    ratios = {}
    if asked.without != "grain":
        grain_seconds = samples["grain MapDataset, rows of 2049 in ArrayRecord"]
        for packing in ("concat", "best_fit"):
            ratios[f"cached {packing} over grain"] = ratio(samples[f"cached, {packing}"], grain_seconds)
    beside = {f"cached, {p}": ratios.get(f"cached {p} over grain") for p in ("concat", "best_fit")}
    tokens = BATCHES * ROWS * SEQ_LEN
    return [
        line(name, seconds, tokens, beside.get(name), "grain") for name, seconds in samples.items()
    ], ratios


def synthetic_store(path: Path) -> TokenStore:
    """Random tokens in documents of lognormal lengths, in the files of a real store."""
    random = np.random.default_rng(0)
    count = TOKENS // MEAN
    lengths = (
        np.maximum(1, random.lognormal(np.log(MEAN) - SPREAD**2 / 2, SPREAD, count)).astype(np.int64) + 2
    )
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    path.mkdir()
    random.integers(0, 50_000, int(offsets[-1]), dtype=np.uint16).tofile(path / "tokens.bin")
    np.save(path / "offsets.npy", offsets)
    return opened(path)


def opened(path: Path) -> TokenStore:
    """The store without its manifest: only what a loader reads."""
    tokens = np.memmap(path / "tokens.bin", dtype=np.uint16, mode="r")
    offsets = np.load(path / "offsets.npy")
    return TokenStore(path, tokens, offsets, np.ones(50_000, np.int32), int(offsets[-1]), 0, 0)


def cached_loader(path: Path) -> Loader:
    """A loader of a process of its own."""
    return Loader(opened(path), DataConfig(seq_len=SEQ_LEN), global_batch_size=ROWS, seed=0)


def write_rows(path: Path, store: TokenStore) -> None:
    """The token file cut into rows of inputs and last target, one a record, uncompressed as the store is."""
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    tokens = np.asarray(store.tokens)
    for first in range(0, len(tokens) - SEQ_LEN - 1, SEQ_LEN):
        writer.write(tokens[first : first + SEQ_LEN + 1].tobytes())
    writer.close()


def grain_reader(path: Path) -> Callable[[], float]:
    """Seconds of as many batches, shuffled, read by Grain's threads; inputs and targets as int32, no more."""
    import grain

    def arrays(record: bytes) -> dict[str, np.ndarray]:
        row = np.frombuffer(record, np.uint16).astype(np.int32)
        return {"tokens": row[:-1], "targets": row[1:]}

    source = grain.sources.ArrayRecordDataSource([str(path)])
    dataset = grain.MapDataset.source(source).shuffle(seed=0).map(arrays).repeat()
    batches: Iterator[Any] = iter(dataset.to_iter_dataset().batch(ROWS))
    # Its 16 threads have 500 rows ready.
    return steady(lambda: next(batches), BATCHES, ready=500 // ROWS + 1)


# Thread or process


def in_turn(loader: Loader, steps: Iterator[int]) -> Any:
    """The next batch, made when it is asked for."""
    return loader.batch(next(steps))


def steady(take: Callable[[], Any], count: int, ready: int = 3) -> Callable[[], float]:
    """Seconds of so many batches from what makes them ahead, when those that lay ready are gone."""

    def measured() -> float:
        for _ in range(ready):
            take()
        seconds = timed(lambda: [take() for _ in range(count)])
        time.sleep(0.5)  # those that lie ready for the next round are made in nobody's time
        return seconds

    return measured


def in_thread(loader: Loader, count: int) -> Callable[[], float]:
    """Batches of the prefetching thread, as training has them."""
    return steady(Prefetcher(loader, start=loader.state()["step"], depth=2).next, count)


def in_process(make: tuple[Callable[..., Loader], tuple], count: int) -> Callable[[], float]:
    """Batches of a spawned process, pickled through a pipe, at most two of them waiting."""
    context = multiprocessing.get_context("spawn")
    batches: Any = context.Queue(maxsize=2)
    process = context.Process(target=_produce, args=(make, batches), daemon=True)
    process.start()
    batches.get()
    return steady(batches.get, count)


def _produce(make: tuple[Callable[..., Loader], tuple], batches: Any) -> None:
    loader = make[0](*make[1])
    for step in itertools.count():
        batches.put(loader.batch(step))


# Text


def text(folder: Path, asked: argparse.Namespace) -> tuple[list[dict], dict]:
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

    def store() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            return timed(lambda: write_store(Path(aside), documents, encoding, workers=asked.cores, about={}))

    loader = Loader(prepared, data, global_batch_size=ROWS, seed=0)
    loader.batch(0)
    cases = {
        "the tokenizer library, one batch of all texts": lambda: timed(
            lambda: backend.encode_batch_fast(texts, add_special_tokens=False)
        ),
        f"preparing, {asked.cores} processes": store,
        "streaming, in the prefetching thread": in_thread(loader, STREAMED),
        "streaming, in a process of its own": in_process(
            (streamed_loader, (prepared.facts(), data)), STREAMED
        ),
    }
    samples = {name: seconds[1:] for name, seconds in alternate(cases, asked.rounds + 1).items()}
    streamed = STREAMED * ROWS * SEQ_LEN
    done = {name: streamed if name.startswith("streaming") else tokens for name in cases}
    per_token = {name: [s / done[name] for s in seconds] for name, seconds in samples.items()}
    alone = per_token["the tokenizer library, one batch of all texts"]
    ratios = {
        "preparing over the tokenizer library": ratio(
            per_token[f"preparing, {asked.cores} processes"], alone
        ),
        "streaming over the tokenizer library": ratio(
            per_token["streaming, in the prefetching thread"], alone
        ),
    }
    beside = {name: ratio(seconds, alone) for name, seconds in per_token.items() if seconds is not alone}
    return [
        line(name, seconds, done[name], beside.get(name), "the library") for name, seconds in samples.items()
    ], ratios


def streamed_loader(facts: dict[str, Any], data: DataConfig) -> Loader:
    """A loader of a process of its own."""
    return Loader(follow(facts), data, global_batch_size=ROWS, seed=0)


def write_texts(folder: Path) -> None:
    """Texts of lognormal lengths whose words are drawn by Zipf's law from a made-up vocabulary."""
    random = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    share = 1 / np.arange(1, 27)
    words = [
        "".join(random.choice(letters, size, p=share / share.sum()))
        for size in random.integers(1, 11, 20_000)
    ]
    chance = 1 / np.arange(1, len(words) + 1)
    chance /= chance.sum()
    folder.mkdir()
    written = number = 0
    while written < TEXT_BYTES:
        count = max(5, int(random.lognormal(np.log(400) - SPREAD**2 / 2, SPREAD)))
        one = " ".join(words[i] for i in random.choice(len(words), count, p=chance)) + ".\n"
        (folder / f"{number}.txt").write_text(one, "utf-8")
        written, number = written + len(one), number + 1


def line(
    name: str, seconds: list[float], tokens: int, beside: dict[str, float] | None, what: str
) -> dict[str, Any]:
    """A row of the table."""
    rates = summary([tokens / s / 1e6 for s in seconds])
    return {
        "case": name,
        "million tokens/s": rates["median"],
        "quartiles": f"{rates['q1']:.3g} to {rates['q3']:.3g}",
        "beside it": beside and f"{beside['median']:.3g} ({beside['q1']:.3g} to {beside['q3']:.3g}) x {what}",
    }


if __name__ == "__main__":
    sys.exit(main())
